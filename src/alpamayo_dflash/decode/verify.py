"""Everything that runs the target's text model: the prompt, and rows after it.

A row is a node of the tail's tree: a token, its position and its parent. It sees the whole prompt, its
ancestors and itself, nothing else. Autoregressive decoding, a draft's block, several samples, teacher
forcing: all are rows. Which samples stand on a row is the loop's business.

What computes them is `decode.forward`.

Shapes: P prompt tokens, R rows, T entries, H heads, K KV heads, D head dim, C hidden, V vocabulary, X
context, F taps·C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alpamayo_dflash.common.graphs import CapturedCall, Recent
from alpamayo_dflash.common.machine import Stopwatch, current, device_index, uploaded
from alpamayo_dflash.decode.cache import ROOT, Cache
from alpamayo_dflash.decode.forward import FusedModel, text_model
from alpamayo_dflash.decode.prompt_pass import PromptPass
from alpamayo_dflash.decode.tree import Tree
from alpamayo_dflash.decode.vision import VisionReader
from alpamayo_dflash.target.prompt import Prompt, check_history
from alpamayo_dflash.target.qwen3 import AfterLayer
from alpamayo_dflash.target.vision import VisionFeatures
from alpamayo_dflash.target.vlm import Qwen3VLTarget

_FORCED_KEPT = 4
"""Graphs of `force` that are kept for their numbers of rows to come again."""
_ROWS_MULTIPLE, _MANY_ROWS, _MANY_MULTIPLE = 16, 128, 64


@dataclass(frozen=True)
class Recording:
    """Layers whose outputs are recorded apart from a draft's taps: at a prompt's end, and in `force`.

    Attributes:
        layers: in the order in which they are concatenated.
        context_len: how many of the prompt's last positions.
    """

    layers: Sequence[int] = ()
    context_len: int = 0


_NO_RECORDING = Recording()


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


@dataclass(frozen=True)
class ForcedTexts:
    """Given texts after a prompt, run through the target.

    Attributes:
        paths: of each text the slots of its tokens.
        prompt_logits_V: float32 [V], what the prompt's last row predicts.
        logits_RV: float32 [R, V], unmasked, a row for each distinct beginning.
        rows: which of these each slot is.
    """

    paths: list[list[int]]
    prompt_logits_V: Tensor
    logits_RV: Tensor
    rows: dict[int, int]

    def logits(self, index: int) -> Tensor:
        """Float32 [T + 1, V] of a text of T tokens: row i predicts token i, the last what follows them."""
        rows = [self.rows[slot] for slot in self.paths[index]]
        return torch.cat(
            (self.prompt_logits_V[None], self.logits_RV[device_index(rows, self.logits_RV.device)])
        )


class Verifier:
    """The target with a cache, fed prompts and rows.

    Args:
        target: the model.
        taps: layers whose outputs are kept, in the order in which they are concatenated.
        context_len: X, how many of the prompt's last positions keep them.
        prompt_capacity: the longest prompt, tokens.
        row_width: the one number of rows that every pass has, or None.
        vision_reuse_bytes: what images seen before may take with their features; 0 keeps none.
        recording: what is recorded apart from the taps.

    Attributes:
        vision: reads prompts' images.

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
        vision_reuse_bytes: int = 0,
        recording: Recording = _NO_RECORDING,
    ) -> None:
        wrong = [tap for tap in (*taps, *recording.layers) if not 0 <= tap < target.num_layers]
        if wrong:
            raise ValueError(
                f"tap {wrong[0]} is not a layer of the target; it has 0 to {target.num_layers - 1}"
            )
        self.target = target
        self.taps, self.recorded = tuple(taps), tuple(recording.layers)
        self.row_width = row_width
        self.cache = Cache(
            target,
            prompt_capacity=prompt_capacity,
            num_taps=len(self.taps),
            context_len=context_len,
            num_recorded=len(self.recorded),
            recorded_context=recording.context_len,
        )
        self._model = text_model(target, self.cache)
        self.vision = VisionReader(target, reuse_bytes=vision_reuse_bytes)
        self._read = PromptPass(target, self.cache, self._model, self.taps, recorded=self.recorded)
        self.forced: Recent[tuple[int, int], _ForcedRows] = Recent(_FORCED_KEPT)
        self._forced_generation = 0
        self._reading = object()
        self._begun = False

    def prefill(self, prompt: Prompt, watch: Stopwatch | None = None) -> Prefilled:
        """Read a prompt in one causal pass; only its last row gets logits.

        Args:
            prompt: the prompt.
            watch: times "vision" and "prompt".

        Raises:
            ValueError: the prompt is longer than the cache, or its ego history is none (`check_history`).
        """
        length = len(prompt.input_ids)
        if length > self.cache.prompt_capacity:
            raise ValueError(
                f"the prompt has {length} tokens, but the cache holds at most {self.cache.prompt_capacity}"
            )
        if len(prompt.ego_history_xyz):
            check_history(prompt.ego_history_xyz, prompt.ego_history_rot, f"prompt {prompt.key!r}")
        with torch.inference_mode(), current(self.target.device):
            watch = watch or Stopwatch(self.target.device)
            with watch.part("vision"):
                seen = self.vision(prompt)
            with watch.part("prompt"):
                return self.read(prompt, seen)

    @torch.inference_mode()
    def read(self, prompt: Prompt, seen: VisionFeatures) -> Prefilled:
        """The language half of `prefill`: a prompt whose images have been seen, on the current device."""
        self._reading = object()  # whatever was read before is overwritten from here on
        self._begun = False
        logits = self._read(prompt.input_ids, prompt.position_ids, seen)
        return Prefilled(prompt, logits, self._reading)

    def not_finite(self, where: str) -> ValueError:
        """The error for a target that has no word to say; its prompt is forgotten, and what it left."""
        with torch.inference_mode():
            self.cache.clear()
        self.vision.forget()
        self._reading = object()
        return ValueError(
            f"the target's logits are not finite after {where}: weights, images or dtype are at fault"
        )

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
        """Empty the tail after a prompt that was read, and give it this many slots.

        Raises:
            ValueError: another prompt has been read since.
        """
        self.check(prefilled)
        self.cache.reserve(slots)
        first = self.cache.prompt_length + prefilled.prompt.rope_delta
        positions = torch.arange(first, first + slots, device=self.target.device)
        cos, sin = self.target.rotary(positions.expand(3, -1))
        self.cache.cos[:slots], self.cache.sin[:slots] = cos, sin
        self._begun = True

    @torch.inference_mode()
    def rows(
        self, slots: Sequence[int], *, logits: bool = True, width: int | None = None, record: bool = False
    ) -> Tensor:
        """Run nodes of the tail: write their keys, values and taps, and predict what follows each.

        Args:
            slots: R slots of the tail, parents before their children; a parent outside of the list must
                have been run before.
            logits: whether they are wanted.
            width: rows of each pass, padded or split; left out, the verifier's `row_width`, or R.
            record: also write what is recorded.

        Returns:
            float32 [R, V], unmasked ([0, V] if not wanted).
        """
        width = width or self.row_width or len(slots)
        with current(self.target.device):
            parts = [
                self._pass(slots[i : i + width], width, logits, record) for i in range(0, len(slots), width)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.inference_mode()
    def force(
        self,
        prefilled: Prefilled,
        texts: Sequence[Sequence[int]],
        *,
        step: int | None = None,
        width: int | None = None,
        rejected: int = 0,
        graph: bool = False,
    ) -> ForcedTexts:
        """Run given texts after a prompt, and record; equal beginnings are computed once.

        Args:
            prefilled: the prompt; the tail after it is emptied.
            texts: token ids of each.
            step: how many rows run together; left out, all.
            width: as in `rows`.
            rejected: so many rows of rejected proposals lie in the tail before the texts'.
            graph: replay captured passes, for which rows are padded to `bucket_of_rows` or the verifier's
                `row_width`; where nothing can be captured (on a CPU, in the plain form) it changes nothing.
                Not with `step`, `width` or `rejected`, which ask for passes of another shape.

        Raises:
            ValueError: another prompt has been read since.
        """
        assert not graph or (step, width, rejected) == (None, None, 0)
        graph, count = graph and self._can_capture, rejected + max(1, sum(map(len, texts)))
        self.begin(prefilled, bucket_of_rows(count) if graph else count)
        if rejected:
            self.rows(Tree(self.cache.tail).add_chain([0] * rejected, ROOT), logits=False, width=width)
        tree = Tree(self.cache.tail)
        paths = [tree.add_chain(text, ROOT) for text in texts]
        slots, step = tree.slots, step or max(1, len(tree.slots))
        if graph and slots:
            parts = self._replayed(slots)
        else:
            steps = range(0, len(slots), step)
            parts = [self.rows(slots[i : i + step], width=width, record=True) for i in steps]
        logits_RV = torch.cat(parts) if parts else prefilled.logits_V[None][:0]
        return ForcedTexts(paths, prefilled.logits_V, logits_RV, {slot: i for i, slot in enumerate(slots)})

    def run(
        self,
        tokens_R: Tensor,
        positions_R: Tensor,
        slots_R: Tensor,
        seen_RT: Tensor,
        *,
        logits: bool = True,
        record: bool = False,
    ) -> Tensor | None:
        """One pass, of tensors on the (current) device alone: nothing is read back, so it can be captured.

        Args:
            tokens_R: int64 ids.
            positions_R: int64, among the generated tokens.
            slots_R: int64 slots of the tail; padding rows have the one after the last.
            seen_RT: uint8, the slots that each row sees.
            logits: whether they are wanted.
            record: also write what is recorded.

        Returns:
            [R, V or more] in some float type, or None.
        """
        cache = self.cache
        rotary = cache.cos.index_select(0, positions_R), cache.sin.index_select(0, positions_R)
        taps = self._write(slots_R, record=record) if self.taps or (record and self.recorded) else None
        normed = self._model.rows(tokens_R, slots_R, rotary, seen_RT, taps)
        return self._model.logits(normed) if logits else None

    @property
    def _can_capture(self) -> bool:
        return self.target.device.type == "cuda" and isinstance(self._model, FusedModel)

    def _replayed(self, slots: Sequence[int]) -> list[Tensor]:
        """What `rows` gives of each pass, recorded, by graphs; the host waits for nothing."""
        if self._forced_generation != self.cache.generation:
            self.forced.clear()
            self._forced_generation = self.cache.generation
        width = self.row_width or bucket_of_rows(len(slots))
        columns = bucket_of_rows(self.cache.tail.high_water)
        device, parts = self.target.device, []
        for start in range(0, len(slots), width):
            of_pass = slots[start : start + width]
            index_3R, seen_RT = (uploaded(each, device) for each in self._inputs(of_pass, width, columns))
            with current(device):
                made = self.forced.of((width, columns), partial(_ForcedRows, self, index_3R, seen_RT))
                out_RV = made(index_3R, seen_RT)
            # A copy: the next replay writes to the same tensor.
            parts.append(out_RV[: len(of_pass), : self.target.vocab_size].to(torch.float32, copy=True))
        return parts

    def _pass(self, slots: Sequence[int], width: int, logits: bool, record: bool) -> Tensor:
        target, tail = self.target, self.cache.tail
        columns = tail.capacity if self.row_width else tail.high_water
        index, seen = (each.to(target.device) for each in self._inputs(slots, width, columns))
        out = self.run(index[0], index[1], index[2], seen, logits=logits, record=record)
        if out is None:
            return torch.zeros(0, target.vocab_size, dtype=torch.float32, device=target.device)
        return out[: len(slots), : target.vocab_size].float()

    def _inputs(self, slots: Sequence[int], width: int, columns: int) -> tuple[Tensor, Tensor]:
        """Of a pass on the host: tokens, positions and slots, int64 [3, R], and what is seen, [R, T].

        Padding rows see the prompt alone and write to the slot after the tail.
        """
        tail = self.cache.tail
        assert self._begun, "begin() comes before rows()"
        padding = width - len(slots)
        index = torch.tensor(
            [
                [tail.tokens[slot] for slot in slots] + [0] * padding,
                [tail.positions[slot] for slot in slots] + [0] * padding,
                [*slots, *([tail.capacity] * padding)],
            ],
            device="cpu",
        )
        seen = torch.zeros(width, columns, dtype=torch.uint8, device="cpu")
        seen[: len(slots)] = torch.from_numpy(tail.visible(slots, columns))
        return index, seen

    def _write(self, slots_R: Tensor, *, record: bool) -> AfterLayer:
        """A hook that writes the tapped layers' outputs to the cache, and those that are recorded."""
        width, cache = self.target.hidden_size, self.cache
        sets = [(self.taps, cache.taps, slots_R + cache.context_len)]
        if record:
            sets.append((self.recorded, cache.recorded, slots_R + cache.recorded_context))

        def after_layer(layer: int, hidden: Tensor) -> Tensor:
            for layers, out, entries_R in sets:
                if layer in layers:
                    at = layers.index(layer) * width
                    out[:, at : at + width].index_copy_(0, entries_R, hidden)
            return hidden

        return after_layer


def bucket_of_rows(count: int) -> int:
    """The rows of the captured pass that so many run in."""
    multiple = _ROWS_MULTIPLE if count <= _MANY_ROWS else _MANY_MULTIPLE
    return -(-count // multiple) * multiple


class _ForcedRows:
    """The tensors of a recorded pass with logits, and the graph over them.

    Args:
        verifier: runs it.
        index_3R: the first pass's own: making the graph runs it.
        seen_RT: likewise.
    """

    def __init__(self, verifier: Verifier, index_3R: Tensor, seen_RT: Tensor) -> None:
        self._index, self._seen = index_3R.clone(), seen_RT.clone()
        self._out: Tensor | None = None

        def launch() -> None:
            tokens_R, positions_R, slots_R = self._index
            self._out = verifier.run(tokens_R, positions_R, slots_R, self._seen, record=True)

        self._captured = CapturedCall(launch)

    def __call__(self, index_3R: Tensor, seen_RT: Tensor) -> Tensor:
        """Run the pass: [R, V or more], overwritten by the next."""
        self._index.copy_(index_3R)
        self._seen.copy_(seen_RT)
        self._captured.replay()
        assert self._out is not None
        return self._out
