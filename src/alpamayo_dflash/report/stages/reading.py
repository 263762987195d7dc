"""What a reader of a stage's files gives.

Each reader knows the files of one stage and says what they hold, or None where a folder is not of its stage.
Whether somebody still works on it is for `report.watch` to judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

Named = tuple[str, str]
"""A clip's id, and a text about it."""

Mark = tuple[float, float]
"""A moment, in seconds since 1970, and how much was done by then."""

MOST_MARKS = 20
"""Of so many last marks the rate is taken."""

MOST_RANKS = 2**16


@dataclass(frozen=True)
class Reading:
    """What a stage's files hold.

    Attributes:
        kind: the stage.
        unit: what is counted: clips, steps or ranks.
        done: how many, failed clips among them.
        total: of how many; None where no file says it.
        finished: whether the stage's last file is there.
        marks: when how much was done, in order and of the present run; empty where the files do not say it.
        failed: clips that failed; None where the stage writes that at its end.
        failures: those of them that are known, with the reasons.
        texts: CoCs, the last ones last.
        curves: name to numbers in order.
        figures: name to number.
        notes: where what is shown comes from, and what is not known.
        silent: whether nothing is written before a rank's end.
    """

    kind: str
    unit: str
    done: int
    total: int | None
    finished: bool
    marks: tuple[Mark, ...] = ()
    failed: int | None = None
    failures: tuple[Named, ...] = ()
    texts: tuple[Named, ...] = ()
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    silent: bool = False


class StageReader(Protocol):
    """Reads one folder, again and again."""

    def __call__(self, since: float) -> Reading | None:
        """What the folder holds of the stage; None if it is none.

        Args:
            since: when the present run began, seconds since 1970; 0 if none is known.

        Raises:
            ValueError: a file is damaged; the message names it.
        """


class Failure(TypedDict):
    """A clip that failed."""

    clip_id: str
    reason: str


def named(failures: Iterable[Failure]) -> list[Named]:
    """Clips with the reasons why they failed."""
    return [(failure["clip_id"], failure["reason"]) for failure in failures]


def last(entries: Sequence[Named], count: int) -> tuple[Named, ...]:
    """The last so many."""
    return tuple(entries[max(0, len(entries) - count) :])
