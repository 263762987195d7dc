"""The target's text model over a cache, in its plain form and in its fused one.

Both take device tensors only and read nothing back, so that a pass can be captured in a CUDA graph. Attention
of rows is (prompt part, unmasked) and (tail part, masked): the plain form makes one mask of both, the fused
one merges the two by log-sum-exp.

Shapes: P prompt tokens, R rows, H heads, K KV heads, D head dim, C hidden, V vocabulary, T tail slots,
E cache entries.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from alpamayo_dflash.common.machine import is_hopper
from alpamayo_dflash.decode.cache import Cache
from alpamayo_dflash.target.qwen3 import AfterLayer, run_layers
from alpamayo_dflash.target.qwen3_fused import FusedDecoder, FusedLayer, why_plain
from alpamayo_dflash.target.vlm import Qwen3VLTarget
from alpamayo_dflash.target.weights import Linear, Rows, hooked, padded, why_module

Rotary = tuple[Tensor, Tensor]
FLASH_FIRST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *FLASH_FIRST]
"""Kernels for a prompt's attention, the preferred first; on Hopper cuDNN's is the fastest."""


class TextModel(Protocol):
    """Runs the decoder layers over prompts and rows, and the head."""

    def prompt(
        self, hidden_PC: Tensor, rotary: Rotary, after_layer: AfterLayer, wanted_W: Tensor | None
    ) -> Tensor:
        """Read a prompt from embeddings [P, C]: write its keys and values to the first P entries.

        Args:
            hidden_PC: a row sees those before it, so that rows after the prompt's do not disturb it.
            rotary: cos and sin [P, D].
            after_layer: as in `run_layers`.
            wanted_W: int64, the rows of the last layer's output that are wanted; None for all.

        Returns:
            [W, C] after the final norm.
        """
        ...

    def rows(
        self,
        tokens_R: Tensor,
        slots_R: Tensor,
        rotary: Rotary,
        seen_RT: Tensor,
        after_layer: AfterLayer | None,
    ) -> Tensor:
        """Run rows: write their keys and values to slots of the tail.

        Args:
            tokens_R: int64 ids.
            slots_R: int64; padding rows write after the last slot.
            rotary: cos and sin [R, D].
            seen_RT: uint8, which slots of the tail each row sees.
            after_layer: as in `run_layers`.

        Returns:
            [R, C] after the final norm.
        """
        ...

    def logits(self, normed_RC: Tensor) -> Tensor:
        """[R, V or more] in some float type, unmasked; columns from V on mean nothing."""
        ...


def why_plain_text(target: Qwen3VLTarget) -> str | None:
    """Why a target's text model runs in its plain form; None where the fused one runs."""
    text = target.vlm.model.language_model
    reason = why_plain(target.text_layers, target.embedding, target.vlm.lm_head)
    if reason is None and (found := why_module(text.embed_tokens, nn.Embedding)) is not None:
        reason = f"the embedding is a {found}"
    if reason is None and hooked(text.norm):
        reason = "the final norm has hooks"
    return reason


def text_model(target: Qwen3VLTarget, cache: Cache) -> TextModel:
    """The fused form where it runs, else the plain one; on a GPU a warning gives the reason."""
    reason = why_plain_text(target)
    if reason is None:
        return FusedModel(target, cache)
    cuda = target.device.type == "cuda"
    if cuda:
        warnings.warn(f"the target runs in its plain, slower form: {reason}", stacklevel=2)
    return PlainModel(target, cache, any_length=cuda)


class PlainModel:
    """One masked attention over prompt and tail, PyTorch's operations, the modules' own weights.

    Args:
        target: the model.
        cache: of its prompt and rows.
        any_length: read the prompt's length on the device, so that one captured pass serves every prompt;
            attention then runs over the whole capacity. Otherwise over the prompt's entries alone.
    """

    def __init__(self, target: Qwen3VLTarget, cache: Cache, *, any_length: bool = False) -> None:
        self._target, self._cache, self._any_length = target, cache, any_length

    def prompt(
        self, hidden_PC: Tensor, rotary: Rotary, after_layer: AfterLayer, wanted_W: Tensor | None
    ) -> Tensor:
        """See TextModel."""
        keys, values, length = self._cache.layer_keys, self._cache.layer_values, len(hidden_PC)
        last = None if wanted_W is None else self._target.num_layers - 1

        def attend(layer: int, q_PHD: Tensor, k_PKD: Tensor, v_PKD: Tensor) -> Tensor:
            keys[layer][:length] = k_PKD
            values[layer][:length] = v_PKD
            return _causal(q_PHD, k_PKD, v_PKD, wanted_W if layer == last else None)

        layers = self._target.text_layers
        hidden = run_layers(layers, hidden_PC, rotary, attend, after_layer, wanted=wanted_W)
        return self._target.final_norm(hidden)

    def rows(
        self,
        tokens_R: Tensor,
        slots_R: Tensor,
        rotary: Rotary,
        seen_RT: Tensor,
        after_layer: AfterLayer | None,
    ) -> Tensor:
        """See TextModel."""
        cache, slots = self._cache, seen_RT.shape[1]
        keys, values = cache.layer_keys, cache.layer_values
        entries_R = slots_R + cache.length_1
        length = (cache.prompt_capacity if self._any_length else cache.prompt_length) + slots
        # The slot of each entry; the prompt's are below 0.
        slot_E = torch.arange(length, device=seen_RT.device) - cache.length_1
        seen_RE = (seen_RT != 0).index_select(1, slot_E.clamp(0, slots - 1)) & (slot_E < slots)
        mask_RE = torch.zeros(seen_RE.shape, dtype=keys[0].dtype, device=seen_RT.device)
        mask_RE.masked_fill_(~(seen_RE | (slot_E < 0)), float("-inf"))

        def attend(layer: int, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor) -> Tensor:
            keys[layer].index_copy_(0, entries_R, k_RKD)
            values[layer].index_copy_(0, entries_R, v_RKD)
            return _attention(q_RHD, keys[layer][:length], values[layer][:length], mask_RE)

        hidden = self._target.embed_ids(tokens_R)
        hidden = run_layers(self._target.text_layers, hidden, rotary, attend, after_layer)
        return self._target.final_norm(hidden)

    def logits(self, normed_RC: Tensor) -> Tensor:
        """See TextModel."""
        return self._target.logits(normed_RC)


class FusedModel:
    """Fused weights and the project's kernels (`target.qwen3_fused`, `kernels`).

    Args:
        target: the model.
        cache: of its prompt and rows.
        attention: kernels for a prompt's attention, the preferred first; by default what suits the GPU.
    """

    def __init__(
        self, target: Qwen3VLTarget, cache: Cache, *, attention: list[SDPBackend] | None = None
    ) -> None:
        self._target, self._cache = target, cache
        self._attention = attention or (CUDNN_FIRST if is_hopper(target.device) else FLASH_FIRST)
        text = target.vlm.model.language_model
        self._decoder = FusedDecoder(target.text_layers, text.norm)
        self._head = Linear(padded(target.head))

    def prompt(
        self, hidden_PC: Tensor, rotary: Rotary, after_layer: AfterLayer, wanted_W: Tensor | None
    ) -> Tensor:
        """See TextModel."""
        cache, length = self._cache, len(hidden_PC)
        entries_P = torch.arange(length, device=hidden_PC.device)
        last = None if wanted_W is None else self._target.num_layers - 1

        def attend(index: int, layer: FusedLayer, normed_PC: Tensor) -> Tensor:
            q_PHD = self._store(index, layer, normed_PC, rotary, entries_P)
            keys, values = cache.layer_keys[index][:length], cache.layer_values[index][:length]
            return _causal(q_PHD, keys, values, wanted_W if index == last else None).flatten(-2)

        with sdpa_kernel(self._attention, set_priority=True):
            return self._decoder(hidden_PC, attend, after_layer, wanted=wanted_W)

    def rows(
        self,
        tokens_R: Tensor,
        slots_R: Tensor,
        rotary: Rotary,
        seen_RT: Tensor,
        after_layer: AfterLayer | None,
    ) -> Tensor:
        """See TextModel."""
        from alpamayo_dflash.kernels.attention import attend

        cache = self._cache
        entries_R = slots_R + cache.length_1

        def attention(index: int, layer: FusedLayer, normed_RC: Rows) -> Rows:
            q_RHD = self._store(index, layer, normed_RC, rotary, entries_R)
            keys, values = cache.layer_keys[index], cache.layer_values[index]
            return attend(q_RHD, keys, values, cache.length_1, seen_RT, cast=layer.out.by_row)

        hidden = functional.embedding(tokens_R, self._target.embedding)
        return self._decoder(hidden, attention, after_layer)

    def logits(self, normed_RC: Tensor) -> Tensor:
        """See TextModel."""
        return self._head(normed_RC)

    def _store(
        self, index: int, layer: FusedLayer, normed_RC: Rows, rotary: Rotary, entries_R: Tensor
    ) -> Tensor:
        """Keys and values of rows to the cache; their queries [R, H, D]."""
        keys, values = self._cache.layer_keys[index], self._cache.layer_values[index]
        return layer.queries(normed_RC, rotary, keys, values, entries_R)


def _causal(q_PHD: Tensor, k_PKD: Tensor, v_PKD: Tensor, wanted_W: Tensor | None) -> Tensor:
    """A prompt's attention: all rows [P, H, D], or the wanted ones."""
    if wanted_W is None:
        return _attention(q_PHD, k_PKD, v_PKD, None)
    keys_P = torch.arange(len(k_PKD), device=wanted_W.device)
    return _attention(q_PHD.index_select(0, wanted_W), k_PKD, v_PKD, keys_P <= wanted_W[:, None])


def _attention(q_RHD: Tensor, k_TKD: Tensor, v_TKD: Tensor, mask_RT: Tensor | None) -> Tensor:
    """PyTorch's attention, [R, H, D]; causal without a mask."""
    out = functional.scaled_dot_product_attention(
        q_RHD.transpose(0, 1).unsqueeze(0),
        k_TKD.transpose(0, 1).unsqueeze(0),
        v_TKD.transpose(0, 1).unsqueeze(0),
        attn_mask=mask_RT,
        is_causal=mask_RT is None,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1)
