"""The language half of a target: a Qwen3-VL and its tokenizer, whoever loaded them.

Decoding needs nothing else, so a bare Qwen3-VL decodes as an Alpamayo does; only trajectories need the rest.

Shapes: P prompt tokens, R rows, C hidden, V vocabulary, D head dim, K KV heads, L layers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from alpamayo_dflash.common.machine import uploaded
from alpamayo_dflash.target.images import PatchShape
from alpamayo_dflash.target.prompt import Prompt, PromptEmbeddings, read_inputs
from alpamayo_dflash.target.qwen3 import AfterLayer, rotary_tables
from alpamayo_dflash.target.rotary import rope_settings
from alpamayo_dflash.target.tokenizer import SpecialTokens
from alpamayo_dflash.target.vision import VisionFeatures, encode_images
from alpamayo_dflash.target.weights import why_module


class Qwen3VLTarget:
    """What decoding reads of a target. The weights are those of `vlm`, read where they lie.

    Attributes:
        vlm: transformers' Qwen3-VL for conditional generation.
        tokenizer: the tokenizer of its vocabulary.
        special: the ids that prompts and texts end or are marked by.
    """

    vlm: Any
    tokenizer: Tokenizer
    special: SpecialTokens[int | None]

    @property
    def traj_ids(self) -> range:
        """Ids that generation never emits; empty where there are no trajectory tokens."""
        return self.special.traj_ids

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.embedding.dtype

    @property
    def text_layers(self) -> nn.ModuleList:
        """The decoder layers that `run_layers` takes."""
        layers: nn.ModuleList = self.vlm.model.language_model.layers
        return layers

    @property
    def embedding(self) -> Tensor:
        """The token embedding, [V, C]."""
        weight: Tensor = self.vlm.model.language_model.embed_tokens.weight
        return weight

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Embeddings [..., C] of int64 ids: the table's rows, or what an adapter on it makes of them."""
        table: nn.Module = self.vlm.model.language_model.embed_tokens
        if why_module(table, nn.Embedding) is None:
            return nn.functional.embedding(ids, self.embedding)
        embedded: Tensor = table(ids)
        return embedded

    @property
    def head(self) -> Tensor:
        """The language head, [V, C]."""
        weight: Tensor = self.vlm.lm_head.weight
        return weight

    @property
    def num_layers(self) -> int:
        """L, the text model's layers."""
        return len(self.text_layers)

    @property
    def hidden_size(self) -> int:
        """C, the text model's width."""
        return int(self.vlm.config.text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V, the rows of the embedding and of the head."""
        return len(self.embedding)

    @property
    def num_kv_heads(self) -> int:
        """K, the key and value heads a layer."""
        return int(self.vlm.config.text_config.num_key_value_heads)

    @property
    def num_heads(self) -> int:
        """H, the query heads a layer."""
        return int(self.vlm.config.text_config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """D, the width of a head."""
        return int(self.vlm.config.text_config.head_dim)

    @property
    def patch_shape(self) -> PatchShape:
        """How the vision tower cuts images."""
        vision = self.vlm.config.vision_config
        return PatchShape(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)

    def prompt_from_inputs(
        self,
        inputs: Mapping[str, Any],
        *,
        key: str = "",
        ego_history_xyz: Tensor | None = None,
        ego_history_rot: Tensor | None = None,
    ) -> Prompt:
        """A prompt of what transformers' processor (or NVIDIA's helper) makes, for one window.

        Args:
            inputs: `input_ids` [1, P] with image tokens repeated, `pixel_values`, `image_grid_thw`.
            key: the window's name; with the seed it fixes the noise.
            ego_history_xyz: [..., M, 3] metres. Needed for trajectories, and where the ids still hold
                history placeholders, over which it is written.
            ego_history_rot: [..., M, 3, 3].

        Raises:
            ValueError: the inputs are not one whole unpadded prompt with images, or its history is missing.
        """
        prompt = read_inputs(
            inputs,
            image_pad=self.special.image_pad,
            merge=self.patch_shape.merge,
            key=key,
            ego_history_xyz=ego_history_xyz,
            ego_history_rot=ego_history_rot,
        )
        return dataclasses.replace(prompt, input_ids=self._fused(prompt))

    def _fused(self, prompt: Prompt) -> Tensor:
        """The prompt's ids with no history placeholder left (design, invariant 5)."""
        placeholder = self.special.traj_history
        if placeholder is not None and bool((prompt.input_ids == placeholder).any()):
            raise ValueError("inputs: the ids hold <|traj_history|> placeholders; fuse the history first")
        return prompt.input_ids

    def see(self, prompt: Prompt) -> VisionFeatures:
        """Run the vision tower in its plain form over a prompt's images, on the model's device."""
        pixels = uploaded(prompt.pixel_values, self.device).to(self.dtype)
        return encode_images(self.vlm.model.visual, pixels, prompt.image_grid_thw)

    def embed(self, prompt: Prompt) -> PromptEmbeddings:
        """Run the vision tower and put its features into the token embeddings.

        Args:
            prompt: on the model's device.
        """
        seen = self.see(prompt)
        return self.placed(prompt.input_ids, self.image_positions(prompt.input_ids, seen), seen)

    def image_positions(self, ids_P: Tensor, seen: VisionFeatures) -> Tensor:
        """Where the image tokens of a prompt stand, int64 [T].

        Raises:
            ValueError: the images' features are not as many.
        """
        positions_T = (ids_P == self.special.image_pad).nonzero().flatten()
        if len(positions_T) != len(seen.embeds):
            raise ValueError(
                f"the prompt has {len(positions_T)} image tokens, but its images give {len(seen.embeds)}"
            )
        return positions_T

    def placed(self, ids_P: Tensor, positions_T: Tensor, seen: VisionFeatures) -> PromptEmbeddings:
        """The token embeddings with the images' features in their places.

        Args:
            ids_P: int64.
            positions_T: int64, from `image_positions`.
            seen: the features.
        """
        hidden = self.embed_ids(ids_P)
        hidden = hidden.index_copy(0, positions_T, seen.embeds.to(hidden.dtype))
        return PromptEmbeddings(hidden, seen.deepstack.to(hidden.dtype), positions_T)

    def deepstack_after_layer(self, embeddings: PromptEmbeddings) -> AfterLayer:
        """The hook for `run_layers` over a prompt: adds feature k at image positions behind layer k."""
        positions, features = embeddings.image_positions, embeddings.deepstack

        def after_layer(layer: int, hidden: Tensor) -> Tensor:
            if layer >= len(features):
                return hidden
            return hidden.index_copy(-2, positions, hidden.index_select(-2, positions) + features[layer])

        return after_layer

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [..., R, D] in the model's dtype, of positions int64 [3, ..., R]."""
        rope = rope_settings(self.vlm.config.text_config)
        cos, sin = rotary_tables(
            position_ids, head_dim=self.head_dim, theta=rope.rope_theta, mrope_section=rope.mrope_section
        )
        return cos.to(self.dtype), sin.to(self.dtype)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm between the last layer and the head, [..., C]."""
        normed: Tensor = self.vlm.model.language_model.norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [..., V], unmasked, of normed states [..., C]."""
        logits: Tensor = self.vlm.lm_head(hidden)
        return logits.float()

    def coc_text(self, token_ids: Sequence[int]) -> str:
        """The Chain-of-Causation in generated ids: what stands before the first `<|cot_end|>`."""
        return self.section(token_ids, "cot")

    def section(self, token_ids: Sequence[int], name: str) -> str:
        """A named section (`cot`, `meta_action`, `answer`) of ids; "" if it does not end in them."""
        return extract_section(self.tokenizer.decode(list(token_ids), skip_special_tokens=False), name)

    def transformers_inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """What `vlm.generate` (or `vlm` itself) takes for a prompt, on the model's device."""
        moved = prompt.to(self.device)
        input_ids = moved.input_ids.unsqueeze(0)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": moved.pixel_values.to(self.dtype),
            "image_grid_thw": moved.image_grid_thw,
        }
        # transformers 5 finds the images by it and 4.57 does not know it.
        if "mm_token_type_ids" in inspect.signature(self.vlm.forward).parameters:
            inputs["mm_token_type_ids"] = (input_ids == self.special.image_pad).int()
        return inputs


def extract_section(text: str, name: str) -> str:
    """The text before the first `<|name_end|>`, after the last `<|name_start|>` in it; "" without an end."""
    before, end, _ = text.partition(f"<|{name}_end|>")
    return before.rpartition(f"<|{name}_start|>")[2].strip() if end else ""
