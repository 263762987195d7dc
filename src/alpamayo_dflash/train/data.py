"""Blocks of a distillation set: which there are, in what order they come, and their tensors.

A set holds whole responses; blocks are formed here. Every response position with a token after it can be an
anchor; a block's context are the states strictly before the anchor, its labels the tokens after it, up to the
response's end. Blocks of one response stay together, so that their states are read and projected once.

Shapes: S blocks of a batch, U states, F taps·C, X context, B masks of a block, R label rows, k stored logits,
N all blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.distill.shards import DistillSample, clip_number, is_held_out
from alpamayo_dflash.draft.blocks import anchors, context_slots, label_positions
from alpamayo_dflash.draft.config import DraftConfig


@dataclass(frozen=True)
class ResponseTensors:
    """One response's tensors.

    Attributes:
        states: [prompt states + T, F], in the order of the taps.
        prompt_states: how many of them belong to the prompt.
        teacher_logits: [T, k], row i predicts token i; None where nothing needs them.
        teacher_ids: [T, k].
    """

    states: Tensor
    prompt_states: int
    teacher_logits: Tensor | None
    teacher_ids: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        parts = (self.states, self.teacher_logits, self.teacher_ids)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass(frozen=True)
class BlockBatch:
    """Some blocks.

    Attributes:
        states: [U, F], of the data's dtype.
        entries: int64 [S, X], the state in each context slot.
        context_lengths: int64 [S], filled slots.
        anchors: int64 [S], token ids.
        labels: int64 [S, B], token ids; 0 where there is none.
        labelled: bool [S, B].
        label_rows: int64 [R], the label rows' places among the S·B masks, ascending: counted on the host, so
            that no step waits for the device to count them.
        row_ends: label rows up to the end of each block, S numbers of the host's.
        teacher_logits: [R, k] of the label rows, block by block; None where nothing needs them.
        teacher_ids: int64 [R, k].
    """

    states: Tensor
    entries: Tensor
    context_lengths: Tensor
    anchors: Tensor
    labels: Tensor
    labelled: Tensor
    label_rows: Tensor
    row_ends: Sequence[int]
    teacher_logits: Tensor | None
    teacher_ids: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """All that there are, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}

    def to(self, device: torch.device | str) -> BlockBatch:
        """The same on another device; from pinned memory the copies go on after the return."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> BlockBatch:
        """The same in memory that a GPU copies from by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> BlockBatch:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)


@dataclass(frozen=True)
class Blocks:
    """A list of blocks, int64 [N] both.

    Attributes:
        responses: the response each is from.
        positions: the response position of each anchor.
    """

    responses: Tensor
    positions: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.responses)

    def __getitem__(self, part: slice) -> Blocks:
        """A run of them."""
        return Blocks(self.responses[part], self.positions[part])


def split_samples(
    samples: Sequence[DistillSample], *, share: float, chunks: Sequence[int] | None
) -> tuple[list[DistillSample], list[DistillSample]]:
    """Split responses into (train, held out) so that all of a clip's are on one side.

    Args:
        samples: all responses.
        share: share of clips held out, by hash.
        chunks: hold out these chunks instead.

    Raises:
        ValueError: a side is empty.
    """
    if chunks is None:
        held = [is_held_out(sample.clip_id, share) for sample in samples]
    else:
        held = [sample.chunk in chunks for sample in samples]
    train = [sample for sample, out in zip(samples, held, strict=True) if not out]
    rest = [sample for sample, out in zip(samples, held, strict=True) if out]
    if not train or not rest:
        clips = len({sample.clip_id for sample in samples})
        how = f"chunks {list(chunks)}" if chunks is not None else f"a share of {share}"
        side = "held-out" if train else "training"
        raise ValueError(
            f"no {side} clip: {how} of {clips} clips leaves that side empty; "
            "raise --held-out, or name --held-out-chunks"
        )
    return train, rest


def of_few_clips(samples: Sequence[DistillSample], count: int | None) -> list[DistillSample]:
    """The responses on so many clips, those whose ids have the lowest hashes; all if `count` is None.

    Raises:
        ValueError: there are fewer clips.
    """
    clips = sorted({sample.clip_id for sample in samples}, key=clip_number)
    if count is not None and count > len(clips):
        raise ValueError(f"train_clips is {count}; there are {len(clips)} training clips")
    kept = set(clips[:count])
    return [sample for sample in samples if sample.clip_id in kept]


class ResponseSource(Protocol):
    """What is read of a distillation set: `distill.data.DistillData`, or one in memory."""

    folder: Path
    manifest: dict[str, Any]

    def tensors(self, sample: DistillSample) -> dict[str, Tensor]:
        """One response's tensors, as `DistillData.tensors` gives them."""


class BlockData:
    """The blocks of some responses of a distillation set.

    Attributes:
        lengths: int64 [responses], tokens of each.
        fits: whether the whole set can be kept in memory.
    """

    def __init__(
        self,
        data: ResponseSource,
        samples: Sequence[DistillSample],
        draft: DraftConfig,
        *,
        teacher: bool,
        unlabelled: range,
        cache_bytes: int,
    ) -> None:
        """Set up; tensors are read when batches are asked for, and kept up to `cache_bytes`.

        Args:
            data: the set.
            samples: the responses.
            draft: taps, context length and block size.
            teacher: whether batches carry the target's logits.
            unlabelled: token ids that are no labels and that the target's logits leave out (trajectory
                tokens); an empty range keeps all.
            cache_bytes: memory for tensors kept.

        Raises:
            ValueError: the draft taps other layers, or sees more prompt states, than the set has; or a token
                id lies outside the vocabulary.
        """
        taps = list(data.manifest["taps"])
        missing = [tap for tap in draft.target_layer_ids if tap not in taps]
        if missing:
            raise ValueError(f"{data.folder}: has taps {taps}; the draft also needs {missing}")
        if draft.context_len > data.manifest["context_len"]:
            raise ValueError(
                f"{data.folder}: keeps {data.manifest['context_len']} prompt states; the draft's "
                f"context_len is {draft.context_len}. Lower it, or generate data with more"
            )
        self.data, self.samples, self.config = data, list(samples), draft
        self.teacher, self.unlabelled = teacher, unlabelled
        self.lengths = torch.tensor([len(sample.token_ids) for sample in self.samples])
        self._starts = self.lengths.cumsum(0) - self.lengths
        self._tokens = torch.tensor([token for sample in self.samples for token in sample.token_ids])
        if bool(((self._tokens < 0) | (self._tokens >= draft.vocab_size)).any()):
            raise ValueError(f"{data.folder}: a token id is outside the vocabulary of {draft.vocab_size}")
        self._taps = [taps.index(tap) for tap in draft.target_layer_ids]
        self._cache: dict[int, ResponseTensors] = {}
        self._room = cache_bytes
        self.fits = data.manifest["bytes"] <= cache_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of responses."""
        return len(self.samples)

    def blocks(self, order: Iterable[int], stride: int = 1) -> Blocks:
        """All blocks of the responses in `order`."""
        positions = {int(index): anchors(int(self.lengths[index]), stride) for index in order}
        responses = [torch.full_like(found, index) for index, found in positions.items()]
        if not responses:
            return Blocks(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        return Blocks(torch.cat(responses), torch.cat(list(positions.values())))

    def epoch(self, seed: int, epoch: int, stride: int = 1) -> Blocks:
        """All blocks, responses in the epoch's own random order (a function of seed and epoch alone)."""
        generator = torch.Generator().manual_seed(generator_seed(seed * 100_003 + epoch))
        return self.blocks(torch.randperm(len(self), generator=generator).tolist(), stride)

    def response(self, index: int) -> ResponseTensors:
        """Read one response, or take it from memory.

        Raises:
            ValueError: its shard is missing or corrupt.
        """
        with self._lock:  # reader threads share the set's open files
            if index in self._cache:
                return self._cache[index]
            found = self._read(self.samples[index])
            if found.num_bytes <= self._room:
                self._room -= found.num_bytes
                self._cache[index] = found
            return found

    def _read(self, sample: DistillSample) -> ResponseTensors:
        tensors = self.data.tensors(sample)
        prompt = tensors["prompt_states"]
        # The set fills up short prompts with zeros at the left; a layer never puts out nothing but zeros.
        prompt = prompt[prompt.flatten(1).any(dim=1)][-self.config.context_len :]
        states = torch.cat((prompt, tensors["states"]))
        if not bool(torch.isfinite(states).all()):
            raise ValueError(f"{self.data.folder}: {sample.shard}: states of {sample.index} are not finite")
        if self._taps != list(range(states.shape[1])):
            states = states[:, self._taps]
        return ResponseTensors(
            states=states.flatten(1),
            prompt_states=len(prompt),
            teacher_logits=tensors["topk_logits"] if self.teacher else None,
            teacher_ids=tensors["topk_ids"] if self.teacher else None,
        )

    def batch(self, blocks: Blocks) -> BlockBatch:
        """The tensors of some blocks."""
        config = self.config
        found, local_S = torch.unique_consecutive(blocks.responses, return_inverse=True)
        responses = [self.response(int(index)) for index in found]
        states = torch.cat([response.states for response in responses])
        prompt_S = torch.tensor([response.prompt_states for response in responses])[local_S]
        entries_SX, filled_S = context_slots(blocks.positions, prompt_S, config.context_len)
        first_S = _starts([len(response.states) for response in responses])[local_S]

        labels_at_SB, labelled_SB = label_positions(
            blocks.positions, self.lengths[blocks.responses], config.block_size
        )
        token_start_S = self._starts[blocks.responses]
        labels_SB = self._tokens[token_start_S[:, None] + labels_at_SB] * labelled_SB
        if len(self.unlabelled):
            labelled_SB &= (labels_SB < self.unlabelled.start) | (labels_SB >= self.unlabelled.stop)
            labels_SB = labels_SB * labelled_SB
        row_start_S = _starts([int(self.lengths[index]) for index in found])[local_S]
        label_rows = labelled_SB.flatten().nonzero()[:, 0]
        rows_R = (row_start_S[:, None] + labels_at_SB).flatten()[label_rows]
        logits_Rk, ids_Rk = self._teacher(responses, rows_R)
        return BlockBatch(
            states=states,
            entries=entries_SX + first_S[:, None],
            context_lengths=filled_S,
            anchors=self._tokens[token_start_S + blocks.positions],
            labels=labels_SB,
            labelled=labelled_SB,
            label_rows=label_rows,
            row_ends=labelled_SB.sum(1).cumsum(0).tolist(),
            teacher_logits=logits_Rk,
            teacher_ids=ids_Rk,
        )

    def _teacher(
        self, responses: list[ResponseTensors], rows_R: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The target's logits at some tokens of the responses, those of tokens it may not write left out."""
        logits = [response.teacher_logits for response in responses if response.teacher_logits is not None]
        ids = [response.teacher_ids for response in responses if response.teacher_ids is not None]
        if not logits:
            return None, None
        logits_Rk = torch.cat(logits)[rows_R].float()
        ids_Rk = torch.cat(ids)[rows_R].long()
        if len(self.unlabelled):
            left_out = (ids_Rk >= self.unlabelled.start) & (ids_Rk < self.unlabelled.stop)
            if bool(left_out.all(-1).any()):
                raise ValueError(
                    f"a label position has only trajectory tokens among its {ids_Rk.shape[-1]} stored "
                    "logits; make the data without full_vocab or with a larger top_k_logits, or set "
                    "trajectory_labels"
                )
            logits_Rk = logits_Rk.masked_fill(left_out, -torch.inf)
        return logits_Rk, ids_Rk


def _starts(sizes: Sequence[int]) -> Tensor:
    """Where each of several runs begins when they are put one after the other."""
    counts = torch.tensor(sizes)
    return counts.cumsum(0) - counts


def step_count(num_blocks: int, batch_size: int, world_size: int) -> int:
    """Steps of an epoch, so that every block comes once and every process has one in each step.

    Raises:
        ValueError: there are fewer blocks than processes.
    """
    if num_blocks < world_size:
        raise ValueError(f"{num_blocks} blocks are too few for {world_size} processes")
    return min(-(-num_blocks // (batch_size * world_size)), num_blocks // world_size)


def step_share(num_blocks: int, steps: int, step: int, rank: int, world_size: int) -> slice:
    """A process's part of a step: steps are equal to one block, and so are the parts of a step."""
    begin, end = num_blocks * step // steps, num_blocks * (step + 1) // steps
    size = end - begin
    return slice(begin + size * rank // world_size, begin + size * (rank + 1) // world_size)
