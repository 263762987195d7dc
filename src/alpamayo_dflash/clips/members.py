"""Members of the dataset's zip archives, read into memory within limits; nothing is unpacked to disk."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

MOST_MEMBER_BYTES = 2**29
"""The largest member that is read; a camera's 20 s at 1080p have some 20 MB."""

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1  # of a member's flags


class ArchiveError(ValueError):
    """An archive or a member of it that cannot be read as what it must be."""


def read_members(stream: Any, names: Mapping[str, str]) -> dict[str, bytes]:
    """Read members of a zip.

    Args:
        stream: the open archive.
        names: by alias, the members' names.

    Returns:
        Each one's content by its alias.

    Raises:
        ArchiveError: the archive is damaged; or a member is missing, climbs out of the archive, is encrypted,
            packed in another way than stored or deflated, damaged, or larger than `MOST_MEMBER_BYTES`. The
            message names it.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            return {alias: _read(archive, name) for alias, name in names.items()}
    # What zipfile lets through for damaged directories, beside its own error.
    except (zipfile.BadZipFile, struct.error, NotImplementedError, OverflowError, EOFError, OSError) as error:
        raise ArchiveError(f"not a whole zip archive ({type(error).__name__}: {error})") from None
    except (UnicodeDecodeError, MemoryError) as error:
        raise ArchiveError(f"not a zip archive that can be read ({type(error).__name__}: {error})") from None


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    if not is_member_name(name):
        raise ArchiveError(f"member {name!r:.300}: not the plain name of a member")
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise ArchiveError(
            f"member {name}: there is none of that name among {len(archive.namelist())}"
        ) from None
    if member.flag_bits & _ENCRYPTED:
        raise ArchiveError(f"member {name}: encrypted; it must not be")
    if member.compress_type not in _METHODS:
        raise ArchiveError(
            f"member {name}: packed by method {member.compress_type}; stored or deflated are read"
        )
    if member.file_size > MOST_MEMBER_BYTES:
        raise ArchiveError(f"member {name}: {member.file_size} bytes; at most {MOST_MEMBER_BYTES} are read")
    try:
        content = archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, struct.error, NotImplementedError) as error:
        raise ArchiveError(f"member {name}: damaged ({error})") from None
    if len(content) != member.file_size:
        raise ArchiveError(f"member {name}: {len(content)} bytes, not the {member.file_size} that it says")
    return content


def is_member_name(name: str) -> bool:
    """Whether a name is a relative path of printable characters that stays where it is."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not any(part in ("", ".", "..") for part in parts)
