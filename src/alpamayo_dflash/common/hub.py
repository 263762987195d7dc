"""Calls to the hub that end: with what they return, with their own error, or after a time without a byte.

The hub's library gives up a silent connection after seconds, but it tries again, and its transfer library has
no limit at all; a command that waits for ever says less than one that fails.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

STALL_VARIABLE = "ALPAMAYO_HUB_STALL_S"
"""Environment variable: seconds without a new byte on the disk after which a call is given up."""

_STALL_S = 120.0
_Answer = TypeVar("_Answer")


def stall_seconds() -> float:
    """The limit that holds.

    Raises:
        ValueError: the environment variable is no number of seconds above 0.
    """
    text = os.environ.get(STALL_VARIABLE) or str(_STALL_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{STALL_VARIABLE} is {text!r}; it must be a number of seconds above 0")
    return seconds


def ended(call: Callable[[], _Answer], what: str, folder: Path) -> _Answer:
    """Call the hub's library, and give up when nothing has come for a while.

    Args:
        call: in a thread of its own, which is left behind where it does not end.
        what: is asked for, for the message.
        folder: the repository's in the cache, whose files grow as bytes arrive.

    Raises:
        TimeoutError: (an OSError) the call has not ended and the folder has not grown for `stall_seconds`.
        ValueError: the limit is not a number.
        Exception: what the call raised.
    """
    limit = stall_seconds()
    answer: list[_Answer] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(call())
        except BaseException as caught:
            error.append(caught)

    thread = threading.Thread(target=run, name=f"hub: {what}", daemon=True)
    thread.start()
    state, since = _state(folder), time.monotonic()
    while thread.is_alive():
        thread.join(min(1.0, limit / 4))
        now = _state(folder)
        if now != state:
            state, since = now, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since > limit:
            raise TimeoutError(
                f"{what}: nothing came from the hub for {limit:g} s; try again, or set {STALL_VARIABLE}"
            )
    if error:
        raise error[0]
    return answer[0]


def _state(folder: Path) -> tuple[int, int, int]:
    """What changes when a byte arrives: files, their sizes, and when the last was written."""
    count = size = newest = 0
    for path in (folder / "blobs").glob("*"):
        try:
            found = path.stat()
        except FileNotFoundError:  # finished and renamed meanwhile
            continue
        count, size, newest = count + 1, size + found.st_size, max(newest, found.st_mtime_ns)
    return count, size, newest
