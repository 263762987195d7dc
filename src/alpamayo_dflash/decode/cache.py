"""The memory of one prompt and what is generated after it: keys, values and tapped states.

One preallocated storage: the prompt's entries, then the tail's slots, then one slot that padding rows write
to. Nothing is cropped or copied whole; slots are freed and used again.

Shapes: L layers, P prompt tokens, X context, S sample, T entries, K KV heads, D head dim, F taps·C features.
What is kept apart from a draft's taps (`Recording`) has an X and an F of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alpamayo_dflash.common.machine import check_memory
from alpamayo_dflash.target.expert import ActionPrefix
from alpamayo_dflash.target.vlm import Qwen3VLTarget

_FIRST_TAIL_SLOTS = 256
_SLOTS_MULTIPLE = 64


class Cache:
    """Storage for a prompt of up to `prompt_capacity` tokens and a tail.

    Args:
        target: fixes layers, heads, dtype and device.
        prompt_capacity: the longest prompt, tokens.
        num_taps: how many layers' outputs are kept.
        context_len: how many positions before an anchor the draft sees; beyond `prompt_capacity` all.
        num_recorded: how many layers' outputs are recorded apart from those.
        recorded_context: how many of the prompt's last positions are recorded.

    Attributes:
        context_len: X, how many of the prompt's last positions keep their tapped states.
        recorded_context: X of what is recorded.
        keys: [L, prompt_capacity + slots + 1, K, D], rotated.
        values: of the same shape.
        taps: [X + slots + 1, F]: the prompt's last X positions, right-aligned, then the slots.
        recorded: the same of what is recorded.
        prompt_length: P.
        length_1: int64 [1], the same on the device.
        cos: [slots, D], rotary table of the positions after the prompt; filled by whoever knows them.
        sin: likewise.
        generation: counts the allocations, so that who captured the tensors' addresses knows when they are
            no longer these.
        tail: the bookkeeping of the slots.
    """

    def __init__(
        self,
        target: Qwen3VLTarget,
        *,
        prompt_capacity: int,
        num_taps: int,
        context_len: int,
        num_recorded: int = 0,
        recorded_context: int = 0,
    ) -> None:
        self._like = target.embedding
        self._heads = (target.num_layers, target.num_kv_heads, target.head_dim)
        self._features = num_taps * target.hidden_size
        self._recorded_features = num_recorded * target.hidden_size
        self.prompt_capacity = prompt_capacity
        self.context_len = min(context_len, prompt_capacity)
        self.recorded_context = min(recorded_context, prompt_capacity)
        self._context_limit = context_len
        self.prompt_length = 0
        self.length_1 = torch.zeros(1, dtype=torch.int64, device=self._like.device)
        self.generation = 0
        self._require(_FIRST_TAIL_SLOTS, "a smaller prompt_capacity")
        self._allocate(_FIRST_TAIL_SLOTS)
        self.tail = Tail(_FIRST_TAIL_SLOTS)

    def _require(self, slots: int, remedy: str) -> None:
        """Raise ValueError if storage for so many slots does not fit into the memory that is free."""
        layers, heads, dim = self._heads
        entries = self.prompt_capacity + slots + 1
        values = 2 * layers * entries * heads * dim
        values += (self.context_len + slots + 1) * self._features + 2 * slots * dim
        values += (self.recorded_context + slots + 1) * self._recorded_features
        check_memory(
            values * self._like.element_size(),
            self._like.device,
            f"a cache for {self.prompt_capacity} prompt and {slots} generated tokens",
            remedy,
        )

    def _allocate(self, slots: int) -> None:
        layers, heads, dim = self._heads
        shape = (layers, self.prompt_capacity + slots + 1, heads, dim)
        # Zeros: a masked entry counts for nothing only if it is finite.
        self.keys, self.values = self._like.new_zeros(shape), self._like.new_zeros(shape)
        self.taps = self._like.new_zeros(self.context_len + slots + 1, self._features)
        self.recorded = self._like.new_zeros(self.recorded_context + slots + 1, self._recorded_features)
        self.cos, self.sin = self._like.new_zeros(slots, dim), self._like.new_zeros(slots, dim)
        self._slots = slots
        self.generation += 1
        # Indexing a tensor costs microseconds, so it is done once.
        self.layer_keys, self.layer_values = self.keys.unbind(), self.values.unbind()

    @property
    def slots(self) -> int:
        """How many slots there is storage for."""
        return self._slots

    def clear(self) -> None:
        """Make every entry finite again: a masked NaN is a NaN all the same."""
        for tensor in (self.keys, self.values, self.taps, self.recorded):
            tensor.zero_()

    def grow(self, slots: int) -> None:
        """Make room for so many slots; the prompt stays.

        Raises:
            ValueError: they do not fit into the memory that is free.
        """
        if slots <= self._slots:
            return
        self._require(slots, "fewer max_new_tokens or samples")
        keys, values, taps, used = self.keys, self.values, self.taps, self.prompt_length
        recorded = self.recorded
        self._allocate(slots)
        self.keys[:, :used], self.values[:, :used] = keys[:, :used], values[:, :used]
        self.taps[: self.context_len] = taps[: self.context_len]
        self.recorded[: self.recorded_context] = recorded[: self.recorded_context]

    def reserve(self, slots: int) -> None:
        """Empty the tail and give it this many slots; the prompt stays. Raises as `grow`."""
        self.grow(slots)
        self.tail = Tail(slots)

    def begin_prompt(self, length: int) -> None:
        """Say that entries [0, length) are the prompt's from now on; the tail is emptied.

        Args:
            length: P.
        """
        self.prompt_length = length
        self.length_1.fill_(length)
        self.tail = Tail(self.tail.capacity)

    def keep_context(self, taps_NF: Tensor) -> None:
        """Keep the tapped states of the prompt's last N positions, at most X; those before are zero."""
        _keep_last(self.taps[: self.context_len], taps_NF)

    def record_context(self, states_NF: Tensor) -> None:
        """The same of what is recorded."""
        _keep_last(self.recorded[: self.recorded_context], states_NF)

    def context(self, paths: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The tapped states of the last positions at the end of each path: X of them, or all there are.

        Args:
            paths: S lists of slots, from the prompt's end on.

        Returns:
            [S, X, F], right-aligned, finite (zero, or another's) where there are fewer than X positions, and
            int64 [S] their number.
        """
        kept = self.context_len
        width = kept
        if self._context_limit > kept:
            width = min(self._context_limit, self.prompt_length + max(map(len, paths)))
        prompt = list(range(kept))
        rows = [(prompt + [kept + slot for slot in path])[-width:] if width else [] for path in paths]
        rows = [[row[0]] * (width - len(row)) + row if row else row for row in rows]
        lengths = [min(width, self.prompt_length + len(path)) for path in paths]
        device = self.taps.device
        return self.taps[torch.tensor(rows, device=device)], torch.tensor(lengths, device=device)

    def prefix(self, paths: Sequence[Sequence[int]], offsets: Sequence[int], rope_delta: int) -> ActionPrefix:
        """What the action expert reads of each sample.

        Args:
            paths: S lists of slots that a sample's way-points see after the prompt.
            offsets: S counts of generated tokens, cached or not.
            rope_delta: the prompt's.
        """
        prompt, device = self.prompt_length, self.keys.device
        lengths = torch.tensor([prompt + len(path) for path in paths], device=device)
        positions = torch.tensor([prompt + offset + rope_delta for offset in offsets], device=device)
        if len(paths) == 1 and list(paths[0]) == list(range(len(paths[0]))):
            end = prompt + len(paths[0])  # the entries lie in order: no copy
            return ActionPrefix(self.keys[:, None, :end], self.values[:, None, :end], lengths, positions)
        longest = max(len(path) for path in paths)
        rows = [
            [*range(prompt), *(prompt + slot for slot in path), *([0] * (longest - len(path)))]
            for path in paths
        ]
        index = torch.tensor(rows, device=device)
        return ActionPrefix(self.keys[:, index], self.values[:, index], lengths, positions)


def per_sample_slots(max_new_tokens: int, rows: int) -> int:
    """Slots for a text of that length and the rows after it, rounded up so that shapes recur."""
    return -(-(max_new_tokens + rows) // _SLOTS_MULTIPLE) * _SLOTS_MULTIPLE


def _keep_last(out_XF: Tensor, states_NF: Tensor) -> None:
    """Write N ≤ X rows to the end of X; those before become zero."""
    missing = len(out_XF) - len(states_NF)
    out_XF[:missing] = 0
    out_XF[missing:] = states_NF


ROOT = -1
"""The parent of the first generated token: the end of the prompt."""


class Tail:
    """A tree of tokens after a prompt.

    Args:
        capacity: slots.

    Attributes:
        tokens: token id by slot.
        positions: index among the generated tokens by slot; 0 stands directly after the prompt.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self._parents: list[int] = []
        self._used: set[int] = set()
        self._freed: list[int] = []  # a heap; slots beyond these lists' ends have never been used

    @property
    def high_water(self) -> int:
        """One past the highest slot in use."""
        return max(self._used, default=-1) + 1

    def add(self, token: int, parent: int = ROOT) -> int:
        """Put `token` after the slot `parent` and return its slot, the lowest free one.

        Raises:
            ValueError: no slot is free.
        """
        if len(self._used) == self.capacity:
            raise ValueError(f"all {self.capacity} slots of the tail are in use; reserve more")
        position = 0 if parent == ROOT else self.positions[parent] + 1
        if self._freed:
            slot = heapq.heappop(self._freed)
            self.tokens[slot], self.positions[slot], self._parents[slot] = token, position, parent
        else:
            slot = len(self.tokens)
            self.tokens.append(token)
            self.positions.append(position)
            self._parents.append(parent)
        self._used.add(slot)
        return slot

    def keep(self, slots: Iterable[int]) -> None:
        """Free every slot but these; a slot's ancestors are kept with it."""
        kept = set(slots)
        for slot in self._used - kept:
            heapq.heappush(self._freed, slot)
        self._used = kept

    def visible(self, slots: Sequence[int], columns: int) -> npt.NDArray[np.bool_]:
        """Return bool [R, columns]: whether slot c is the node in slots[r] itself or an ancestor of it."""
        seen = np.zeros((len(slots), columns), dtype=bool)
        rows: dict[int, int] = {}
        for row, slot in enumerate(slots):
            parent = self._parents[slot]
            if parent in rows:
                seen[row] = seen[rows[parent]]
            else:
                ancestors = []
                while parent != ROOT:
                    ancestors.append(parent)
                    parent = self._parents[parent]
                seen[row, ancestors] = True
            seen[row, slot] = True
            rows[slot] = row
        return seen
