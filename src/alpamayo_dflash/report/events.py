"""The scalars of TensorBoard's event files, read on as they grow."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.report.files import listed, stamp_of

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_NAMES = "*tfevents*"


class Point(NamedTuple):
    """A logged number: the step, the number, and when it was logged in seconds since 1970."""

    step: int
    value: float
    at: float


class EventLogs:
    """A folder of event files. What an interrupted run logged after its last checkpoint is left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._inodes: dict[Path, int] = {}
        self._logs: EventAccumulator | None = None

    def curves(self) -> dict[str, list[Point]]:
        """Tag to its points in order, of those that are finite; of very many points a sample.

        A record that is not whole yet, or damaged, ends what is read of its file.
        """
        inodes = {path: stamp[0] for path in listed(self.folder, _NAMES) if (stamp := stamp_of(path))}
        if any(inodes.get(path) != inode for path, inode in self._inodes.items()):
            self._logs = None  # others lie in their place
        self._inodes = inodes
        if not inodes:
            return {}
        if self._logs is None:
            self._logs = _accumulator(self.folder)
        logs = _reloaded(self._logs)
        return {} if logs is None else logs

    def modified(self) -> float:
        """When the last event was written, seconds since 1970; 0 where there is none."""
        stamps = (stamp_of(path) for path in self._inodes)
        return max((stamp[1] / 1e9 for stamp in stamps if stamp), default=0.0)


def _accumulator(folder: Path) -> EventAccumulator:
    with needs("report"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # It warns of every restart that it sorts out, onto the terminal that is being drawn on.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    return EventAccumulator(str(folder))


def _reloaded(logs: EventAccumulator) -> dict[str, list[Point]] | None:
    """What event files hold by now; None where their folder is gone."""
    with needs("report"):
        from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError

    try:
        logs.Reload()
    except DirectoryDeletedError:
        return None
    found = {}
    for tag in logs.Tags()["scalars"]:
        points = (Point(event.step, event.value, event.wall_time) for event in logs.Scalars(tag))
        found[tag] = [point for point in points if math.isfinite(point.value)]
    return found
