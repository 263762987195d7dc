"""What rounds add up to, clip by clip: by place in the block, by place in the sentence, by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass
class Places:
    """Counts of one clip by place, from 1.

    Attributes:
        reached: the rounds that proposed a token there and had taken all before it.
        proposed: the rounds that proposed a token there.
        taken: the rounds whose token there was taken.
    """

    reached: Counter[int] = field(default_factory=Counter)
    proposed: Counter[int] = field(default_factory=Counter)
    taken: Counter[int] = field(default_factory=Counter)


def recorded(rows: Sequence[Row]) -> list[Row]:
    """The rows that keep their rounds."""
    return [row for row in rows if "rounds" in row]


def rounds_of(row: Row) -> Iterable[Mapping[str, Any]]:
    """A clip's rounds over all samples."""
    return (each for sample in row.get("rounds", []) for each in sample)


def depths(parents: Sequence[int]) -> list[int]:
    """How far behind the anchor each proposed token stands: 1 is right behind it.

    Args:
        parents: of each token the index of the one before it; −1 is the anchor.
    """
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def block_places(row: Row) -> Places:
    """A clip's counts by place in the block."""
    found = Places()
    for each in rounds_of(row):
        places = depths(each["parents"])
        proposed, taken = set(places), {places[index] for index in each["taken"]}
        found.proposed.update(proposed)
        found.taken.update(taken)
        found.reached.update(place for place in proposed if place == 1 or place - 1 in taken)
    return found


def sentence_places(row: Row) -> dict[int, Counter[str]]:
    """Of each place in the sentence (the first token after the prompt is 0) who gave the tokens there."""
    found: dict[int, Counter[str]] = {}
    for each in rounds_of(row):
        for place, origin in enumerate(each["origins"], each["position"] + 1):
            found.setdefault(place, Counter())[origin] += 1
    return found


def tokens_a_round(rows: Sequence[Row]) -> Counter[int]:
    """How many rounds gave how many tokens."""
    return Counter(len(each["emitted"]) for row in rows for each in rounds_of(row))


def sources(rows: Sequence[Row]) -> Counter[str]:
    """Who gave the tokens after the first."""
    return Counter(origin for row in rows for each in rounds_of(row) for origin in each["origins"])
