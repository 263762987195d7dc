"""The pass that reads a prompt: embeddings with the images' features, every layer, taps, first logits.

It works on device tensors and reads nothing back. On a GPU in the fused form it is a CUDA graph for each
bucket of lengths: rows after the prompt's are padding, which no row of the prompt sees, and room for rows
that shall ride in the pass.

Shapes: P prompt rows, B rows of the bucket, W wanted rows, X context, T image tokens, C hidden, V vocabulary,
F taps·C features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alpamayo_dflash.common.graphs import CapturedCall, Recent
from alpamayo_dflash.common.machine import uploaded
from alpamayo_dflash.decode.cache import Cache
from alpamayo_dflash.decode.forward import FusedModel, TextModel
from alpamayo_dflash.target.qwen3 import AfterLayer
from alpamayo_dflash.target.vision import VisionFeatures
from alpamayo_dflash.target.vlm import Qwen3VLTarget

LENGTH_MULTIPLE = 128  # the rows of a large product's tile
ROOM = 64
"""Rows that a bucket has after the prompt's at least."""
Work = Callable[[Tensor, Tensor, Tensor, VisionFeatures], Tensor]
"""See `PromptPass.work`."""
_KEPT = 2
"""Buckets that are kept; each holds its graph's memory."""


def bucket_of(length: int) -> int:
    """The rows of the pass that reads so many tokens."""
    return -(-(length + ROOM) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


class PromptPass:
    """Reads prompts into a cache.

    Args:
        target: the model.
        cache: takes the prompt's keys, values and taps.
        model: the target's text model over that cache.
        taps: layers whose outputs at the last positions are kept, in the order in which they are joined.
        recorded: the same of what is recorded apart from those.
        graph: capture it; left out, on a GPU in the fused form.
    """

    def __init__(
        self,
        target: Qwen3VLTarget,
        cache: Cache,
        model: TextModel,
        taps: Sequence[int],
        *,
        recorded: Sequence[int] = (),
        graph: bool | None = None,
    ) -> None:
        self._target, self._cache, self._model = target, cache, model
        self._taps, self._recorded = tuple(taps), tuple(recorded)
        fused = target.device.type == "cuda" and isinstance(model, FusedModel)
        self._graph = fused if graph is None else graph
        self._generation = 0
        self.kept: Recent[tuple[int, int, int], _Bucket] = Recent(_KEPT)

    def __call__(self, host_ids: Tensor, positions_3P: Tensor, seen: VisionFeatures) -> Tensor:
        """Read a prompt; the cache's length is set to it.

        Args:
            host_ids: int64 [P], on the CPU or the device; from the CPU nothing is waited for.
            positions_3P: int64 [3, P], M-RoPE positions (t, h, w).
            seen: of its images.

        Returns:
            float32 [V], what the prompt's last row predicts, unmasked.

        Raises:
            ValueError: the images' features are not as many as the ids' image tokens.
        """
        at_T = self._target.image_positions(host_ids, seen)
        length = len(host_ids)
        self._cache.begin_prompt(length)
        ids_P, positions_3P, at_T = (
            uploaded(each, self._target.device) for each in (host_ids, positions_3P, at_T)
        )
        if not self._graph:
            return self.work(ids_P, positions_3P, at_T, seen)
        return self._bucket(length, seen).run(ids_P, positions_3P, at_T, seen)

    def _bucket(self, length: int, seen: VisionFeatures) -> _Bucket:
        """The buffers and the graph for such a prompt."""
        if self._generation != self._cache.generation:
            self.kept.clear()
            self._generation = self._cache.generation
        rows = bucket_of(length)
        key = rows, len(seen.embeds), len(seen.deepstack)
        return self.kept.of(key, lambda: _Bucket(self.work, rows, seen))

    def work(self, ids_B: Tensor, positions_3B: Tensor, at_T: Tensor, seen: VisionFeatures) -> Tensor:
        """The pass itself, of tensors on the (current) device.

        Args:
            ids_B: padded after the prompt, or the prompt's own.
            positions_3B: likewise.
            at_T: int64, where the image tokens stand.
            seen: their features.

        Returns:
            float32 [V].
        """
        target, cache = self._target, self._cache
        embeddings = target.placed(ids_B, at_T, seen)
        last = target.num_layers - 1
        contexts = tuple(min(each, len(ids_B)) for each in (cache.context_len, cache.recorded_context))
        most = max(contexts)
        rows_X = cache.length_1 - most + torch.arange(most, device=ids_B.device)
        wanted_W = cache.length_1 - 1
        of_last = [
            context
            for context, layers in zip(contexts, (self._taps, self._recorded), strict=True)
            if last in layers
        ]
        if any(of_last):
            wanted_W = _end(rows_X, max(of_last)).clamp_min(0)
        # Of the last layer's output few rows are read; features are added to all of a layer's rows.
        trimmed = len(embeddings.deepstack) <= last
        tapped: dict[int, Tensor] = {}

        def after_layer(layer: int, hidden: Tensor) -> Tensor:
            hidden = add_features(layer, hidden)
            if layer in self._taps or layer in self._recorded:
                few = trimmed and layer == last
                tapped[layer] = hidden if few else hidden.index_select(0, rows_X.clamp_min(0))
            return hidden

        add_features: AfterLayer = target.deepstack_after_layer(embeddings)
        normed = self._model.prompt(
            embeddings.hidden,
            target.rotary(positions_3B),
            after_layer,
            wanted_W if trimmed else None,
        )
        if not trimmed:
            normed = normed.index_select(0, wanted_W)
        if self._taps:
            states_XF = torch.cat([_end(tapped[tap], contexts[0]) for tap in self._taps], dim=-1)
            cache.keep_context(states_XF * (_end(rows_X, contexts[0]) >= 0)[:, None])
        if self._recorded:
            states_XF = torch.cat([_end(tapped[layer], contexts[1]) for layer in self._recorded], dim=-1)
            cache.record_context(states_XF * (_end(rows_X, contexts[1]) >= 0)[:, None])
        logits: Tensor = self._model.logits(normed[-1:])[0, : target.vocab_size].float()
        return logits


def _end(rows: Tensor, count: int) -> Tensor:
    """The last rows, so many."""
    return rows[len(rows) - count :]


class _Bucket:
    """The buffers for prompts of up to B tokens with T image tokens, and the graph over them."""

    def __init__(self, work: Work, rows: int, seen: VisionFeatures) -> None:
        device = seen.embeds.device
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._at = torch.arange(len(seen.embeds), device=device)
        self._seen = VisionFeatures(torch.zeros_like(seen.embeds), torch.zeros_like(seen.deepstack))
        self._logits: Tensor | None = None

        def launch() -> None:
            self._logits = work(self._ids, self._positions, self._at, self._seen)

        self._captured = CapturedCall(launch)

    def run(self, ids_P: Tensor, positions_3P: Tensor, at_T: Tensor, seen: VisionFeatures) -> Tensor:
        """Read a prompt; the host does not wait for it."""
        length = len(ids_P)
        self._ids[:length], self._positions[:, :length] = ids_P, positions_3P
        self._ids[length:], self._positions[:, length:] = 0, 0
        self._at.copy_(at_T)
        self._seen.embeds.copy_(seen.embeds)
        self._seen.deepstack.copy_(seen.deepstack)
        self._captured.replay()
        assert self._logits is not None
        return self._logits.clone()
