"""JSON text to values, within limits: what a hostile or damaged file can do ends here, by name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

MOST_BYTES = 2**29
"""The longest JSON text that is read; an evaluation of thousands of clips with its rounds has a tenth."""

MOST_DEPTH = 64
"""How deep values may be nested; what is read here has ten levels at most."""

_PIECE_BYTES = 2**20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json_value(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is missing, longer than `MOST_BYTES`, or not JSON as `parse_json` takes it; the message
            names it.
    """
    data = bytearray()
    try:
        with path.open("rb") as stream:
            # In pieces: a device has no length, and a read of so many bytes takes them all beforehand.
            while len(data) <= MOST_BYTES and (piece := stream.read(_PIECE_BYTES)):
                data += piece
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, not a file") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: longer than {MOST_BYTES} bytes, the most that is read as JSON")
    return parse_json(bytes(data), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text: UTF-8, finite numbers, each key once, at most `MOST_DEPTH` levels.

    Args:
        text: the text, or its bytes.
        where: the file, for messages.

    Raises:
        ValueError: it is none, or goes beyond that.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object)
        _check_values(value)
        if _SURROGATE.search(text):  # a half of a pair can be neither written nor hashed
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON (nested deeper than {MOST_DEPTH} levels)") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys; which of two equal ones is meant cannot be told."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def _check_values(value: Any) -> None:
    """Go through a value level by level."""
    level, depth = [value], 0
    while level:
        if any(type(each) is float and not math.isfinite(each) for each in level):
            raise ValueError("it holds a number that is not finite")
        boxes = [each for each in level if isinstance(each, (dict, list))]
        depth += bool(boxes)
        if depth > MOST_DEPTH:
            raise ValueError(f"nested deeper than {MOST_DEPTH} levels")
        level = [inner for box in boxes for inner in (box.values() if isinstance(box, dict) else box)]
