"""Everything that runs the target's text model: the prompt, and rows behind it.

A row is a node of the tail's tree: a token, its position and its parent. It sees the whole prompt, its
ancestors and itself, nothing else. Autoregressive decoding, a draft's block, several samples, teacher
forcing: all are rows. Which samples stand on a row is the loop's business.

This is the plain form: one masked attention over prompt and tail.

Shapes: P prompt tokens, R rows, T entries, H heads, K KV heads, D head dim, C hidden, V vocabulary, X
context, F taps·C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alpamayo_dflash.decode.cache import Cache
from alpamayo_dflash.target.layers import AfterLayer, Attend, run_layers
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.vlm import Qwen3VLTarget


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the target has read. It is good until its verifier reads another.

    Attributes:
        prompt: the prompt.
        logits_V: float32 [V], unmasked, of the prompt's last row: they predict the first token.
        reading: the pass that read it, so that no other decoder's prompt is taken for this one's.
    """

    prompt: Prompt
    logits_V: Tensor
    reading: object


class Verifier:
    """The target with a cache, fed prompts and rows.

    Args:
        target: the model.
        taps: layers whose outputs are kept, in the order in which they are concatenated.
        context_len: X, how many of the prompt's last positions keep them.
        prompt_capacity: the longest prompt, tokens.
        row_width: the one number of rows that every pass has, or None.

    Raises:
        ValueError: a tap is not a layer of the target.
    """

    def __init__(
        self,
        target: Qwen3VLTarget,
        *,
        taps: Sequence[int] = (),
        context_len: int = 0,
        prompt_capacity: int,
        row_width: int | None = None,
    ) -> None:
        wrong = [tap for tap in taps if not 0 <= tap < target.num_layers]
        if wrong:
            raise ValueError(
                f"tap {wrong[0]} is not a layer of the target; it has 0 to {target.num_layers - 1}"
            )
        self.target = target
        self.taps = tuple(taps)
        self.row_width = row_width
        self.cache = Cache(
            target, prompt_capacity=prompt_capacity, num_taps=len(self.taps), context_len=context_len
        )
        self._reading = object()
        self._rotary: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def prefill(self, prompt: Prompt) -> Prefilled:
        """Read a prompt in one causal pass; only its last row gets logits.

        Raises:
            ValueError: the prompt is longer than the cache.
        """
        target, cache = self.target, self.cache
        length = len(prompt.input_ids)
        if length > cache.prompt_capacity:
            raise ValueError(
                f"the prompt has {length} tokens, but the cache holds at most {cache.prompt_capacity}"
            )
        prompt = prompt.to(target.device)
        embeddings = target.embed(prompt)
        tapped: dict[int, Tensor] = {}
        hook = self._tap(tapped, cache.context_len, target.deepstack_after_layer(embeddings))
        hidden = run_layers(
            target.text_layers,
            embeddings.hidden,
            target.rotary(prompt.position_ids),
            self._attend_prompt(length),
            hook,
        )
        cache.set_prompt(length, self._features(tapped))
        self._reading = object()
        self._rotary = None
        logits = target.logits(target.final_norm(hidden[-1:]))[0]
        return Prefilled(prompt, logits, self._reading)

    def check(self, prefilled: Prefilled) -> None:
        """Make sure that this prompt is the one in the cache.

        Raises:
            ValueError: another prompt has been read since.
        """
        if prefilled.reading is not self._reading:
            raise ValueError(
                f"this prompt ({prefilled.prompt.key}) is not in this cache: another was read since, or "
                "another decoder read it"
            )

    @torch.inference_mode()
    def begin(self, prefilled: Prefilled, slots: int) -> None:
        """Empty the tail behind a prompt that was read, and give it this many slots.

        Raises:
            ValueError: another prompt has been read since.
        """
        self.check(prefilled)
        self.cache.reserve(slots)
        first = self.cache.prompt_length + prefilled.prompt.rope_delta
        positions = torch.arange(first, first + slots, device=self.target.device)
        self._rotary = self.target.rotary(positions.expand(3, -1))

    @torch.inference_mode()
    def rows(self, slots: Sequence[int], *, logits: bool = True) -> Tensor:
        """Run nodes of the tail: write their keys, values and taps, and predict what follows each.

        Args:
            slots: R slots of the tail, parents before their children; a parent outside of the list must
                have been run before.
            logits: whether they are wanted.

        Returns:
            float32 [R, V], unmasked ([0, V] if not wanted).
        """
        width = self.row_width or len(slots)
        parts = [self._pass(slots[i : i + width], width, logits) for i in range(0, len(slots), width)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _pass(self, slots: Sequence[int], width: int, logits: bool) -> Tensor:
        target, cache, tail = self.target, self.cache, self.cache.tail
        assert self._rotary is not None, "begin() comes before rows()"
        padding = width - len(slots)
        # Padding rows see the prompt alone and write to the slot behind the tail.
        index = torch.tensor(
            [
                [tail.tokens[slot] for slot in slots] + [0] * padding,
                [tail.positions[slot] for slot in slots] + [0] * padding,
                [*slots, *([tail.capacity] * padding)],
            ],
        ).to(target.device)
        rotary = (self._rotary[0].index_select(0, index[1]), self._rotary[1].index_select(0, index[1]))
        tapped: dict[int, Tensor] = {}
        hidden = run_layers(
            target.text_layers,
            functional.embedding(index[0], target.embedding),
            rotary,
            self._attend_rows(index[2] + cache.prompt_length, self._mask(slots, width)),
            self._tap(tapped, width, None) if self.taps else None,
        )
        features = self._features(tapped)
        if features is not None:
            cache.taps.index_copy_(0, index[2] + cache.context_len, features)
        if not logits:
            return hidden.new_zeros(0, target.vocab_size, dtype=torch.float32)
        return target.logits(target.final_norm(hidden))[: len(slots)]

    def _mask(self, slots: Sequence[int], width: int) -> Tensor:
        """What each row sees: [R, T] in the model's dtype, 0 or minus infinity."""
        cache = self.cache
        columns = cache.tail.capacity if self.row_width else cache.tail.high_water
        mask = torch.zeros(width, cache.prompt_length + columns)
        hidden = torch.from_numpy(~cache.tail.visible(slots, columns))
        mask[: len(slots), cache.prompt_length :].masked_fill_(hidden, float("-inf"))
        mask[len(slots) :, cache.prompt_length :] = float("-inf")
        return mask.to(self.target.device, self.target.dtype)

    def _attend_prompt(self, length: int) -> Attend:
        keys, values = self.cache.layer_keys, self.cache.layer_values

        def attend(layer: int, q_PHD: Tensor, k_PKD: Tensor, v_PKD: Tensor) -> Tensor:
            keys[layer][:length] = k_PKD
            values[layer][:length] = v_PKD
            out = functional.scaled_dot_product_attention(
                q_PHD.transpose(0, 1).unsqueeze(0),
                k_PKD.transpose(0, 1).unsqueeze(0),
                v_PKD.transpose(0, 1).unsqueeze(0),
                is_causal=True,
                enable_gqa=True,
            )
            return out.squeeze(0).transpose(0, 1)

        return attend

    def _attend_rows(self, entries_R: Tensor, mask_RT: Tensor) -> Attend:
        keys, values = self.cache.layer_keys, self.cache.layer_values
        length = mask_RT.shape[-1]

        def attend(layer: int, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor) -> Tensor:
            keys[layer].index_copy_(0, entries_R, k_RKD)
            values[layer].index_copy_(0, entries_R, v_RKD)
            out = functional.scaled_dot_product_attention(
                q_RHD.transpose(0, 1).unsqueeze(0),
                keys[layer][:length].transpose(0, 1).unsqueeze(0),
                values[layer][:length].transpose(0, 1).unsqueeze(0),
                attn_mask=mask_RT,
                enable_gqa=True,
            )
            return out.squeeze(0).transpose(0, 1)

        return attend

    def _tap(self, into: dict[int, Tensor], last: int, inner: AfterLayer | None) -> AfterLayer:
        """A hook that keeps the last rows of the tapped layers' outputs, behind another hook."""
        wanted = frozenset(self.taps)

        def after_layer(layer: int, hidden: Tensor) -> Tensor:
            if inner is not None:
                hidden = inner(layer, hidden)
            if layer in wanted and last:
                into[layer] = hidden[-last:]
            return hidden

        return after_layer

    def _features(self, tapped: dict[int, Tensor]) -> Tensor | None:
        """Concatenate tapped outputs [N, C] to [N, F], or None if there are none."""
        return torch.cat([tapped[tap] for tap in self.taps], dim=-1) if tapped else None
