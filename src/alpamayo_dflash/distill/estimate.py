"""What a set will take: disk, from its settings, before it is begun; time, as measured, soon after."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from alpamayo_dflash.distill.config import EXPECTED_TOKENS, response_bytes

MANY_CHUNKS, CHUNK_CLIPS = 400, 100
"""The published recipe's chunks, and the most clips that a chunk of the dataset has."""
WARM_WINDOWS, TIMED_WINDOWS = 2, 8
"""The first windows compile, capture and fill what is read ahead; those after them are timed."""


def estimated_bytes(settings: Mapping[str, Any], num_clips: int) -> int:
    """Disk space that the responses on so many clips will take, at `EXPECTED_TOKENS` a response."""
    each = response_bytes(
        num_tokens=min(EXPECTED_TOKENS, settings["max_tokens"]),
        context_len=settings["context_len"],
        num_taps=len(settings["taps"]),
        hidden_size=settings["hidden_size"],
        top_k=settings["top_k"],
        dtype=settings["dtype"],
    )
    return num_clips * int(settings["samples_per_clip"]) * each


def require_disk(folder: Path, settings: Mapping[str, Any], num_clips: int, *, ranks: int) -> int:
    """Print the disk space needed, and refuse to begin where there is less.

    Args:
        folder: the output folder, which need not exist yet.
        settings: of the set.
        num_clips: clips that are left to this rank.
        ranks: processes that write to the same disk, taken to need as much each.

    Returns:
        bytes that this rank needs.

    Raises:
        ValueError: naming folder, need and free space.
    """
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    estimate = estimated_bytes(settings, num_clips)
    need, free = estimate * ranks, shutil.disk_usage(existing).free
    tokens = min(EXPECTED_TOKENS, settings["max_tokens"])
    many = estimated_bytes(settings, MANY_CHUNKS * CHUNK_CLIPS)
    console = Console(stderr=True)
    console.print(
        f"disk needed: about {_size(estimate)}"
        + (f" for this rank, {_size(need)} for all {ranks}" if ranks > 1 else "")
        + f"; free: {_size(free)}",
        soft_wrap=True,
    )
    console.print(
        f"disk for {MANY_CHUNKS} chunks: about {_size(many)}, at {CHUNK_CLIPS} clips a chunk, "
        f"{settings['samples_per_clip']} responses a clip and {tokens} tokens a response",
        soft_wrap=True,
    )
    if need > free:
        raise ValueError(
            f"{folder}: about {_size(need)} are needed, but only {_size(free)} are free; take fewer chunks, "
            "samples, taps or context, or another output_dir"
        )
    return estimate


class Pace:
    """Times a run's first windows and prints, once, what follows for the rest.

    Args:
        num_clips: clips that are left to this rank.
        ranks: processes at work.

    Attributes:
        windows_per_s: of the timed windows; None before.
    """

    def __init__(self, num_clips: int, *, ranks: int) -> None:
        self._left, self._ranks = num_clips, ranks
        self._count, self._start = 0, 0.0
        self.windows_per_s: float | None = None

    def window_done(self) -> None:
        """A window has been written on; those that failed are not told of."""
        self._count += 1
        if self._count == WARM_WINDOWS:
            self._start = time.perf_counter()
        elif self._count == WARM_WINDOWS + TIMED_WINDOWS:
            self.windows_per_s = TIMED_WINDOWS / (time.perf_counter() - self._start)
            Console(stderr=True).print(self._line(self.windows_per_s), soft_wrap=True)

    def _line(self, windows_per_s: float) -> str:
        left = max(0, self._left - self._count)
        first, last = WARM_WINDOWS + 1, WARM_WINDOWS + TIMED_WINDOWS
        many = MANY_CHUNKS * CHUNK_CLIPS / (windows_per_s * self._ranks)
        return (
            f"time: {windows_per_s:.2f} windows a second, measured on this run's windows {first} to {last}; "
            f"at that rate about {_span(left / windows_per_s)} for the {left} clips that are left, and "
            f"{_span(many)} for {MANY_CHUNKS} chunks of {CHUNK_CLIPS} clips on "
            + ("this process" if self._ranks == 1 else f"{self._ranks} such processes")
        )


def _size(count: int) -> str:
    """Bytes for people."""
    size, unit = next(
        ((size, unit) for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= size),
        (1e3, "kB"),
    )
    return f"{count / size:.1f} {unit}"


def _span(seconds: float) -> str:
    """Seconds for people."""
    size, unit = next(
        ((size, unit) for size, unit in ((3600.0, "h"), (60.0, "min")) if seconds >= size), (1.0, "s")
    )
    return f"{seconds / size:.1f} {unit}"
