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
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypedDict

from alpamayo_dflash.common.artefacts import clear_temporaries, to_plain
from alpamayo_dflash.common.fields import checked
from alpamayo_dflash.common.json_text import parse_json
from alpamayo_dflash.common.options import check_range

_NAME = ".run-rank{}.lock"
_LATEST = 2**33  # seconds; a time that calendars have
_MOST_PROCESSES = 2**31
_ASKED, _PAUSE_S = 3, 0.05


class _About(TypedDict):
    mark: str
    host: str
    pid: int
    since: float


@dataclass(frozen=True)
class Owner:
    """Who wrote into a folder's lock that it is at work there; a killed process leaves its word behind.

    Attributes:
        since: seconds since 1970.
        host: its machine's name; None where the lock says nothing that can be read.
        pid: its process there.
    """

    since: float
    host: str | None = None
    pid: int = 0

    @property
    def alive(self) -> bool | None:
        """Whether there is such a process; None where that cannot be told, as of another machine's."""
        if self.host != socket.gethostname() or not 0 < self.pid < _MOST_PROCESSES:
            return None
        try:
            os.kill(self.pid, 0)  # no signal, only the question
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def said_owners(folder: Path) -> list[Owner]:
    """Who says in a folder's locks to be at work there, by rank.

    For who only looks on: the locks are read, not tested, because a test holds a lock for a moment, in which
    the run that it belongs to would be refused.
    """
    found = []
    for path in sorted(folder.glob(_NAME.format("*"))):
        with contextlib.suppress(FileNotFoundError):
            found.append(_said(path))
    return found


def _said(path: Path) -> Owner:
    """What a lock's file says; it is empty for the moment in which it is written."""
    for _ in range(_ASKED):
        about = _about(path.read_text(encoding="utf-8", errors="replace"))
        if about:
            return Owner(about["since"], about["host"], about["pid"])
        time.sleep(_PAUSE_S)
    return Owner(path.stat().st_mtime)


def mark_of(settings: Any) -> str:
    """A run's mark: a short hash of all that makes it this run, the same on each of its ranks."""
    return hashlib.sha256(json.dumps(to_plain(settings), sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def owned(folder: Path, mark: str, rank: int = 0, *, take_over: bool = False) -> Iterator[None]:
    """Own a folder for one rank of a run while the context lasts; the folder is made.

    The first rank to come clears away what files killed runs have left half-written.

    Args:
        folder: the run's output.
        mark: see `mark_of`.
        rank: of this process; ranks of one mark share the folder.
        take_over: go on where locks cannot be tested: only if no other run is known to be at work.

    Raises:
        ValueError: another run has the folder, or this rank of this run has; the message says who and since
            when. Or locks cannot be tested there.
    """
    path = folder / _NAME.format(rank)
    about = {"mark": mark, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    with _registry(folder, take_over):
        handle = path.open("a+", encoding="utf-8", errors="replace")
        try:
            if not take_over:
                _lock(handle, folder)
                if not _others(folder, mark, path):
                    clear_temporaries(folder)
            handle.seek(0)
            handle.truncate()
            json.dump(about, handle)
            handle.flush()
        except ValueError:
            handle.close()
            raise
    try:
        yield
    finally:
        with _registry(folder, take_over):
            path.unlink(missing_ok=True)
            handle.close()
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing came of it


@contextlib.contextmanager
def _registry(folder: Path, take_over: bool) -> Iterator[None]:
    """Be the only one to look at a folder's locks or change them: by a lock on the folder, for a moment."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileExistsError, FileNotFoundError, NotADirectoryError):
            _refuse_file(folder)
            continue  # its last owner has just removed it
        try:
            if not take_over:
                _wait(handle, folder)
            if _is_still(folder, handle):
                yield
                return
        finally:
            os.close(handle)


def _refuse_file(folder: Path) -> None:
    """Raise ValueError if a folder's place, or one that it would lie in, is a file's."""
    for path in (folder, *folder.parents):
        # One look: between two, another process may make the folder or remove it.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if not stat.S_ISDIR(path.stat().st_mode):
                raise ValueError(f"{path}: a file, not a folder")


def _is_still(folder: Path, handle: int) -> bool:
    """Whether a folder is the one that was opened, and no new one in its place."""
    try:
        return folder.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _wait(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        raise ValueError(
            f"{folder}: whether another run is at work there cannot be told on this disk ({error}); use "
            "another output folder, or --take-over if none is"
        ) from None


def _lock(handle: TextIO, folder: Path) -> None:
    """Take a rank's lock, or say who has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise ValueError(_message(folder, _about(handle.read()))) from None


def _others(folder: Path, mark: str, own: Path) -> int:
    """How many other ranks of this run are alive; ValueError if a live process of another mark has a lock."""
    alive = 0
    for other in folder.glob(_NAME.format("*")):
        if other == own:
            continue
        with other.open("r", encoding="utf-8", errors="replace") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                about = _about(handle.read())
                if about.get("mark") != mark:
                    raise ValueError(_message(folder, about)) from None
                alive += 1
    return alive


def _about(text: str) -> dict[str, Any]:
    """What a lock's file says."""
    try:
        about: dict[str, Any] = checked(parse_json(text, "a lock"), _About, "a lock")
        check_range(0, _LATEST, since=about["since"])
    except ValueError:
        return {}  # of another version perhaps; that somebody holds it is what counts
    return about


def _message(folder: Path, about: dict[str, Any]) -> str:
    since = about.get("since")
    when = f" since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}" if since else ""
    who = f"process {about['pid']} on {about['host']}" if about else "another process"
    return f"{folder}: {who} is at work there{when}; wait for it, or use another output folder"
