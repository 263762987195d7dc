"""What was seen of a run at one moment: its stages, and which of them runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alpamayo_dflash.common.locks import Owner
from alpamayo_dflash.report.stages.reading import Reading

State = Literal["running", "stale", "stopped", "finished", "waiting"]


@dataclass(frozen=True)
class Pace:
    """How fast a stage is.

    Attributes:
        per_s: units a second, above 0.
        source: what it was taken from.
        pause_s: the longest time between two marks; 0 where there are none.
    """

    per_s: float
    source: str
    pause_s: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A stage's folder at one look.

    Attributes:
        folder: of the stage.
        state: running; stale, if it says so but has not written for long; stopped, if nobody says so and it
            is not finished; or finished.
        reading: what its files hold; None where it has only begun.
        owners: who says to be at work there.
        last_write: when its files last changed, seconds since 1970.
        pace: of a running stage, where it can be told.
        remark: what the state rests on.
    """

    folder: Path
    state: State
    reading: Reading | None
    owners: Sequence[Owner]
    last_write: float
    pace: Pace | None = None
    remark: str = ""

    @property
    def expected_end(self) -> float | None:
        """When a running stage will be done at its pace, seconds since 1970."""
        reading = self.reading
        if self.state != "running" or reading is None or reading.total is None or self.pace is None:
            return None
        return self.last_write + (reading.total - reading.done) / self.pace.per_s


@dataclass(frozen=True)
class Look:
    """A whole run at one moment.

    Attributes:
        run: its folder.
        state: of the stage in front; waiting, if a demo's next stage has not begun.
        stages: in the order in which they follow each other.
        front: the place in `stages` of the one that runs, or else of the one that wrote last.
        at: the moment, seconds since 1970.
    """

    run: Path
    state: State
    stages: Sequence[Stage]
    front: int
    at: float

    def to_plain(self) -> dict[str, Any]:
        """The JSON object that the command prints."""
        return {
            "run": str(self.run),
            "state": self.state,
            "stage": self.stages[self.front].folder.name,
            "stages": [_plain(stage) for stage in self.stages],
        }


def _plain(stage: Stage) -> dict[str, Any]:
    """A stage as JSON."""
    reading, pace = stage.reading, stage.pace
    found: dict[str, Any] = {
        "folder": str(stage.folder),
        "kind": None if reading is None else reading.kind,
        "state": stage.state,
        "remark": stage.remark or None,
        "last_write": _utc(stage.last_write),
        "began": _utc(min((owner.since for owner in stage.owners), default=None)),
        "rate_per_s": None if pace is None else round(pace.per_s, 6),
        "rate_from": None if pace is None else pace.source,
        "expected_end": _utc(stage.expected_end),
    }
    if reading is None:
        return found
    named = ("texts", "failures")
    return found | {
        **{key: getattr(reading, key) for key in ("unit", "done", "total", "failed", "figures")},
        "last_values": {name: values[-1] for name, values in reading.curves.items() if values},
        **{key: _named(getattr(reading, key)) for key in named},
        "notes": list(reading.notes),
    }


def _named(entries: Sequence[tuple[str, str]]) -> list[Mapping[str, str]]:
    return [{"clip_id": clip_id, "text": text} for clip_id, text in entries]


def _utc(moment: float | None) -> str | None:
    return None if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
