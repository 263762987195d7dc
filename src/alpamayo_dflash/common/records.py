"""Records that carry a checksum of their own: objects of JSON, whole files or lines of one.

A record that was made before there were checksums has none: it is read, and counted as not recorded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "record_sha256"
"""Holds the SHA-256 over all the record's other keys, in hex."""


def digest(value: Any) -> str:
    """The SHA-256 of a JSON value, in hex; the order of keys and the spaces between them do not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object of plain JSON values with its checksum."""
    content = {key: value[key] for key in value if key != KEY}
    return content | {KEY: digest(content)}


def unsealed(value: dict[str, Any], where: str) -> tuple[dict[str, Any], bool]:
    """An object without its checksum, held to it.

    Args:
        value: as it was read.
        where: the file, and the line, for messages.

    Returns:
        the object, and whether it had a checksum.

    Raises:
        ValueError: it is not what was written.
    """
    if KEY not in value:
        return value, False
    content = {key: value[key] for key in value if key != KEY}
    if value[KEY] != digest(content):
        raise ValueError(
            f"{where}: changed since it was written, its {KEY} is of another content; restore it, or remove "
            "that key to have it read as it stands"
        )
    return content, True
