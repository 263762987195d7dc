"""The live view of a run, from its files alone: also of one that another person started, on another machine.

Nothing is locked, written or held open between two looks, so the run does not notice. What a run writes,
`report.stages` reads; here it is judged whether somebody still works on it, how fast, and until when.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from alpamayo_dflash.common.locks import Owner, said_owners
from alpamayo_dflash.report.config import WatchConfig
from alpamayo_dflash.report.files import Files, listed, modified
from alpamayo_dflash.report.look import Look, Pace, Stage, State
from alpamayo_dflash.report.stage_view import view_of
from alpamayo_dflash.report.stages.distill import DistillReader
from alpamayo_dflash.report.stages.evaluate import EvaluateReader
from alpamayo_dflash.report.stages.layers import LayersReader
from alpamayo_dflash.report.stages.reading import Mark, Reading, StageReader
from alpamayo_dflash.report.stages.train import TrainReader
from alpamayo_dflash.report.stages.world import WorldReader
from alpamayo_dflash.report.terminal import duration, visible

READERS = (WorldReader, LayersReader, DistillReader, TrainReader, EvaluateReader)
"""In the order in which stages follow each other."""

_GONE_S = 30
"""A process that cannot be found may be another container's, as long as something was just written."""

_PAUSES = 3
"""A run is stale after so many of its usual pauses, if that is longer than the time of the option."""

_MARKS = 20
_BESIDE = ("logs", "shards")
_SUMMARY = "summary.json"


def run(config: WatchConfig) -> dict[str, Any]:
    """Show a run on standard error, once or until it is finished.

    Returns:
        The last look: `run`, `state` (running, stale, stopped, waiting or finished), `stage` (the one in
        front) and `stages`, each with `folder`, `kind`, `state`, `unit`, `done`, `total`, `failed`,
        `rate_per_s` and what it was taken from, times, `figures`, the last value of each curve, `texts`,
        `failures` and `notes`.

    Raises:
        ValueError: there is no such folder, no run in it, or a damaged file; the message says which.
    """
    watcher, console = Watcher(config), Console(file=sys.stderr)
    try:
        look = watcher.look()
        if config.once:
            console.print(view_of(look, console.width))
            return look.to_plain()
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(view_of(look, console.width), refresh=True)
                if look.state == "finished":
                    return look.to_plain()
                time.sleep(config.interval_s)
                look = watcher.look()
    except ValueError as error:
        raise ValueError(visible(str(error), most=2000)) from None  # it may hold a file's name


@dataclass
class _Watched:
    """A folder's readers, and what was seen of it so far: when how much was done."""

    readers: Sequence[StageReader]
    seen: deque[Mark] = field(default_factory=lambda: deque(maxlen=_MARKS))


class Watcher:
    """Looks at a run again and again."""

    def __init__(self, config: WatchConfig) -> None:
        self.config, self.files = config, Files()
        self._watched: dict[Path, _Watched] = {}

    def look(self) -> Look:
        """The run as it is now.

        Raises:
            ValueError: see `run`.
        """
        folder, now = self.config.run, time.time()
        if not folder.is_dir():
            raise ValueError(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
        whole = self._stage(folder, now)
        inner = [self._stage(each, now) for each in _folders(folder)] if whole is None else [whole]
        stages = [stage for stage in inner if stage is not None]
        if not stages:
            raise ValueError(
                f"{folder}: no run; it must be the output folder of layers, distill, train or evaluate, or "
                "a folder of such folders, as a demo's"
            )
        stages.sort(key=_order)
        front = max(range(len(stages)), key=lambda place: _standing(stages[place]))
        state = stages[front].state
        if state == "finished" and whole is None and _is_unfinished_demo(folder, stages):
            state = "waiting"
        return Look(folder, state, stages, front, now)

    def _stage(self, folder: Path, now: float) -> Stage | None:
        """A folder as a stage; None if it is none."""
        owners = said_owners(folder)
        since = min((owner.since for owner in owners), default=0.0)
        watched = self._watched.setdefault(folder, _Watched(self._readers(folder)))
        found = [reading for reader in watched.readers if (reading := reader(since))]
        if not found and not owners:
            return None
        reading = found[0] if found else None
        last = _last_write(folder, now)
        if reading is not None and (not watched.seen or watched.seen[-1][1] != reading.done):
            if watched.seen and watched.seen[-1][1] > reading.done:
                watched.seen.clear()  # begun anew
            watched.seen.append((now, reading.done))
        pace = None if reading is None else _pace(reading, watched.seen, since, last)
        state, remark = self._state(reading, owners, now - last, pace)
        running = state in ("running", "stale")
        return Stage(folder, state, reading, owners, last, pace if running else None, remark)

    def _readers(self, folder: Path) -> Sequence[StageReader]:
        return [reader(folder, self.files, self.config.texts) for reader in READERS]

    def _state(
        self, reading: Reading | None, owners: Sequence[Owner], quiet_s: float, pace: Pace | None
    ) -> tuple[State, str]:
        """Whether somebody works on a stage, and the reason."""
        limit = max(self.config.stale_min * 60, _PAUSES * pace.pause_s if pace else 0.0)
        gone = bool(owners) and all(owner.alive is False for owner in owners) and quiet_s > _GONE_S
        finished = reading is not None and reading.finished
        if finished and (not owners or gone or quiet_s > limit):
            return "finished", ""
        if gone:
            return "stopped", f"process {owners[0].pid} of this machine is gone"
        alive = any(owner.alive for owner in owners)
        is_world = reading is not None and reading.kind == "world"  # it has no lock
        if not owners and not (is_world and quiet_s <= limit):
            return "stopped", "nobody is at work there"
        if quiet_s > limit and not (alive and (reading is None or reading.silent)):
            there = "its process is there, but " if alive else ""
            return "stale", f"{there}nothing was written for {duration(quiet_s)}"
        return "running", ""


def _folders(folder: Path) -> list[Path]:
    return [path for path in listed(folder) if not path.name.startswith(".") and path.is_dir()]


def _order(stage: Stage) -> tuple[int, str]:
    """Stages follow each other as in a demo; one that has only begun comes last."""
    kinds = ["world", "layers", "distill", "train", "evaluate"]
    return (len(kinds) if stage.reading is None else kinds.index(stage.reading.kind)), stage.folder.name


def _standing(stage: Stage) -> tuple[int, float]:
    """Which of two stages goes in front: the one that runs, then the one that could go on, the later one."""
    return {"running": 2, "stale": 2, "stopped": 1}.get(stage.state, 0), stage.last_write


def _is_unfinished_demo(folder: Path, stages: Sequence[Stage]) -> bool:
    """Whether finished stages are a demo's that has others to come: its summary is written last."""
    is_demo = any(stage.reading is not None and stage.reading.kind == "world" for stage in stages)
    return is_demo and modified(folder / _SUMMARY) is None


def _last_write(folder: Path, now: float) -> float:
    """When a stage last wrote, by its entries; `now` where there are none any more."""
    paths = [*listed(folder), *(path for name in _BESIDE for path in listed(folder / name))]
    times = [at for path in paths if (at := modified(path))]
    return min(max(times, default=now), now)


def _pace(reading: Reading, seen: Sequence[Mark], since: float, last_write: float) -> Pace | None:
    """How fast a stage is, from the best of what is known."""
    for marks, source in ((reading.marks, "the files' own times"), (seen, "what was watched")):
        if len(marks) > 1 and marks[-1][1] > marks[0][1] and marks[-1][0] > marks[0][0]:
            (began, first), (ended, last) = marks[0], marks[-1]
            pause = max(after - before for (before, _), (after, _) in pairwise(marks))
            return Pace((last - first) / (ended - began), source, pause)
    if reading.unit == "clips" and since and reading.done and last_write > since:
        source = "all that is there since it began (too high if it took up earlier work)"
        return Pace(reading.done / (last_write - since), source)
    return None
