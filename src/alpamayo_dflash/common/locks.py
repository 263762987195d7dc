"""A folder has one run at a time: its ranks may share it, another run may not.

The lock is the kernel's (`flock`), which drops it when a process dies, however it dies. What is written into
the file serves the message and tells ranks of one run from strangers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import to_plain

_NAME = ".run-rank{}.lock"


def mark_of(settings: Any) -> str:
    """A run's mark: a short hash of all that makes it this run, the same on each of its ranks."""
    return hashlib.sha256(json.dumps(to_plain(settings), sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def owned(folder: Path, mark: str, rank: int = 0, *, take_over: bool = False) -> Iterator[None]:
    """Own a folder for one rank of a run while the context lasts; the folder is made.

    Args:
        folder: the run's output.
        mark: see `mark_of`.
        rank: of this process; ranks of one mark share the folder.
        take_over: remove a lock that cannot be tested: only where its run is known to be over.

    Raises:
        ValueError: another run has the folder, or this rank of this run has; the message says who and since
            when. Or a lock cannot be tested there, and names its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME.format(rank)
    with _held(path, folder, take_over) as handle:
        handle.seek(0)
        handle.truncate()
        about = {"mark": mark, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        json.dump(about, handle)
        handle.flush()
        try:
            _refuse_strangers(folder, mark, path)
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing came of it


def _refuse_strangers(folder: Path, mark: str, own: Path) -> None:
    """Raise ValueError if a live process of another mark has a lock here."""
    for other in folder.glob(_NAME.format("*")):
        if other == own:
            continue
        with contextlib.suppress(FileNotFoundError), other.open("r", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                about = _about(handle.read())
                if about.get("mark") != mark:
                    raise ValueError(_message(folder, about)) from None


@contextlib.contextmanager
def _held(path: Path, folder: Path, take_over: bool) -> Iterator[Any]:
    """Hold a lock file's lock."""
    if take_over:
        path.unlink(missing_ok=True)
    while True:
        with path.open("a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                raise ValueError(_message(folder, _about(handle.read()))) from None
            except OSError as error:
                raise ValueError(
                    f"{path}: whether another run has this folder cannot be told here ({error}); use another "
                    "output folder, or --take-over if no other run is at work there"
                ) from None
            # Its last holder may have removed the file between our opening and locking it.
            if path.exists() and path.stat().st_ino == os.fstat(handle.fileno()).st_ino:
                yield handle
                return


def _about(text: str) -> dict[str, Any]:
    """What a lock's file says; one that is just being written says nothing."""
    try:
        about = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return about if isinstance(about, dict) else {}


def _message(folder: Path, about: dict[str, Any]) -> str:
    since = about.get("since")
    when = f" since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}" if since else ""
    who = f"process {about['pid']} on {about['host']}" if "pid" in about else "another process"
    return f"{folder}: {who} is at work there{when}; wait for it, or use another output folder"
