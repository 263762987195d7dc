"""Generated tokens as nodes of a tree, in slots that never move.

Bookkeeping only: which slot holds which token, where it stands, and which slots it sees. The tensors that
belong to the slots are the cache's.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

ROOT = -1
"""The parent of the first generated token: the end of the prompt."""


class Tail:
    """A tree of tokens behind a prompt.

    Args:
        capacity: slots.

    Attributes:
        tokens: token id by slot.
        positions: index among the generated tokens by slot; 0 stands directly behind the prompt.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = [0] * capacity
        self.positions = [0] * capacity
        self._visible = np.zeros((capacity, capacity), dtype=bool)
        self._used: set[int] = set()
        self._free = list(range(capacity))

    @property
    def high_water(self) -> int:
        """One past the highest slot in use."""
        return max(self._used, default=-1) + 1

    def add(self, token: int, parent: int = ROOT) -> int:
        """Put `token` behind the slot `parent` and return its slot, the lowest free one.

        Raises:
            ValueError: no slot is free.
        """
        if not self._free:
            raise ValueError(f"all {self.capacity} slots of the tail are in use; reserve more")
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        self.tokens[slot] = token
        self.positions[slot] = 0 if parent == ROOT else self.positions[parent] + 1
        self._visible[slot] = False if parent == ROOT else self._visible[parent]
        self._visible[slot, slot] = True
        return slot

    def keep(self, slots: Iterable[int]) -> None:
        """Free every slot but these."""
        kept = set(slots)
        for slot in self._used - kept:
            heapq.heappush(self._free, slot)
        self._used = kept

    def visible(self, slots: Sequence[int], columns: int) -> npt.NDArray[np.bool_]:
        """Return bool [R, columns]: whether slot c is the node in slots[r] itself or an ancestor of it."""
        return self._visible[list(slots), :columns]
