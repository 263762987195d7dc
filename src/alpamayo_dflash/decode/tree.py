"""The rows of one pass as a tree, and the walk that accepts them. Pure functions on ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from alpamayo_dflash.decode.cache import Tail

Choose = Callable[[Sequence[tuple[int, int]]], Sequence[int]]
"""(sample, slot) pairs -> the token that the target chooses after each slot for that sample."""


class Tree:
    """The rows of one pass. Equal tokens after the same row are one row, whoever proposed them.

    Args:
        tail: gets the rows as nodes.

    Attributes:
        slots: the rows' slots, parents before children.
    """

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._children: dict[tuple[int, int], int] = {}
        self.slots: list[int] = []

    def add(self, token: int, parent: int) -> int:
        """Return the slot of the row for `token` after the slot `parent`, which is made if it is new."""
        slot = self.child(parent, token)
        if slot is None:
            slot = self._tail.add(token, parent)
            self._children[parent, token] = slot
            self.slots.append(slot)
        return slot

    def add_chain(self, tokens: Sequence[int], parent: int) -> list[int]:
        """Add tokens one after the other and return their slots."""
        slots = []
        for token in tokens:
            parent = self.add(token, parent)
            slots.append(parent)
        return slots

    def child(self, parent: int, token: int) -> int | None:
        """The slot of the row for `token` after `parent`, or None."""
        return self._children.get((parent, token))


@dataclass
class Walk:
    """Where a sample's walk led.

    Attributes:
        path: slots of the rows that hold the sample's text, the anchor's first.
        tokens: the tokens emitted: those of path[1:], and the target's own token unless the walk stopped.
    """

    path: list[int]
    tokens: list[int] = field(default_factory=list)


def walk(
    tree: Tree,
    chains: Mapping[int, Sequence[int]],
    choose: Choose,
    room: Mapping[int, int],
    stops: Callable[[int], bool],
    *,
    ends: Mapping[int, int] = MappingProxyType({}),
) -> dict[int, Walk]:
    """Let each sample go down the tree along the target's own choices.

    A sample starts at its anchor's row. The target's choice there is emitted; if the tree has a row for it,
    the walk goes on from that row, whether this sample or another proposed it. It ends where there is no
    such row, after a stop token, or when the sample's room is used up.

    Args:
        tree: the rows, already run.
        chains: by sample, the slots of its anchor and of its own proposal. Choices are made at all of these
            at once; the others, which a sample reaches only on another's proposal, when it gets there.
        choose: the target's choices.
        room: by sample, how many tokens it may emit, at least 1.
        stops: whether nothing is emitted after a token.
        ends: by sample, the slot at whose row it stands still, without the target's token.
    """
    walks = {sample: Walk([slots[0]]) for sample, slots in chains.items()}
    chosen: dict[tuple[int, int], int] = {}

    def go_on(sample: int) -> bool:
        """Walk as far as choices are known; return whether one is missing where the sample now stands."""
        walked = walks[sample]
        while (token := chosen.get((sample, walked.path[-1]))) is not None:
            walked.tokens.append(token)
            child = tree.child(walked.path[-1], token)
            if child is not None:
                walked.path.append(child)
            if child is None or stops(token) or len(walked.tokens) == room[sample]:
                return False
            if ends.get(sample) == child:
                return False
        return True

    asked = [(sample, slot) for sample, slots in chains.items() for slot in slots]
    walking = list(chains)
    while walking:
        chosen.update(zip(asked, choose(asked), strict=True))
        walking = [sample for sample in walking if go_on(sample)]
        asked = [(sample, walks[sample].path[-1]) for sample in walking]
    return walks
