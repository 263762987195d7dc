"""Reading what a run writes while it writes: nothing is locked, held open or taken for whole too early."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar, cast

from alpamayo_dflash.common.fields import checked
from alpamayo_dflash.common.json_text import parse_json
from alpamayo_dflash.common.records import unsealed

_Found = TypeVar("_Found")
_LOOKS, _PAUSE_S = 5, 0.1

Stamp = tuple[int, int, int]
"""Which file lies at a path, and in which state: inode, time of its last change in ns, bytes."""


def stamp_of(path: Path) -> Stamp | None:
    """A file's stamp; None where there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def modified(path: Path) -> float | None:
    """When a file was last changed, seconds since 1970; None where there is none."""
    stamp = stamp_of(path)
    return None if stamp is None else stamp[1] / 1e9


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """A folder's entries of a pattern, sorted; none where it is gone or is a file."""
    try:
        return sorted(path for path in folder.iterdir() if fnmatchcase(path.name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []


class Files:
    """Reads files that others write and replace; what has not changed since is not read again."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[Stamp, Any]] = {}

    def read(self, path: Path, reader: Callable[[Path], _Found]) -> _Found | None:
        """What a reader makes of a file; None where there is none.

        A file that cannot be read and does change is looked at again: somebody may be copying it there.

        Args:
            path: the file; each has one reader.
            reader: raises ValueError for a damaged file.

        Raises:
            ValueError: it cannot be read, and stays as it is.
        """
        for look in range(_LOOKS):
            stamp = stamp_of(path)
            if stamp is None:
                return None
            if path in self._kept and self._kept[path][0] == stamp:
                return cast(_Found, self._kept[path][1])
            try:
                found = reader(path)
            except (ValueError, OSError):  # OSError: on a network's disk, of a file that was replaced
                time.sleep(_PAUSE_S)
                if stamp_of(path) == stamp or look == _LOOKS - 1:
                    raise
                continue
            self._kept[path] = (stamp, found)
            return found
        raise AssertionError("the last look returns or raises")

    def read_in_exchange(self, path: Path, reader: Callable[[Path], _Found]) -> _Found | None:
        """Read a file of a folder that is replaced whole: between two renames neither of the two is there."""
        for _ in range(_LOOKS):
            found = self.read(path, reader)
            if found is not None or not listed(path.parent.parent, f".{path.parent.name}.*"):
                return found
            time.sleep(_PAUSE_S / _LOOKS)
        return None


class Lines:
    """The objects of a file of JSON lines that grows; each line is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset, self._number = -1, 0, 0

    def follow(self, begin: Callable[[], None], take: Callable[[dict[str, Any], str], None]) -> bool:
        """Read what has come since the last call; a last line without its end is left for later.

        Args:
            begin: called first where the file is another than before, or is gone.
            take: called with each line's object, held to its checksum, and with its place for messages.

        Returns:
            whether the file is there.

        Raises:
            ValueError: a whole line is not an object of JSON, or not what was written.
        """
        try:
            stream = self.path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            self._inode, self._offset, self._number = -1, 0, 0
            begin()
            return False
        with stream:
            state = os.fstat(stream.fileno())  # of what was opened: the path may be another file's by now
            if state.st_ino != self._inode or state.st_size < self._offset:
                self._inode, self._offset, self._number = state.st_ino, 0, 0
                begin()
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                where = f"{self.path}: line {self._number + 1}"
                take(unsealed(checked(parse_json(line, where), dict, where), where)[0], where)
                self._offset += len(line)
                self._number += 1
        return True
