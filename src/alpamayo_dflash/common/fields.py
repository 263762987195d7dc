"""Values out of other people's JSON, checked against the kinds that they must be."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")
_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def value_of(raw: Mapping[str, Any], key: str, kind: type[_Kind], default: Any = ..., *, where: str) -> _Kind:
    """A key's value, checked.

    Args:
        raw: an object of a JSON file.
        key: the key.
        kind: int, float, str, bool, list or dict.
        default: stands in where the key is absent or null; left out, the key must be there.
        where: the file, for messages.

    Raises:
        ValueError: the key is missing, or its value is of another kind.
    """
    value = raw.get(key)
    if value is None:
        if default is ...:
            raise ValueError(f"{where}: no {key}; it must be {_WORDS[kind]}")
        value = default
    return typing.cast(_Kind, checked(value, kind, f"{where}: {key}"))


def checked(value: Any, hint: Any, where: str) -> Any:
    """A value of a kind; whole numbers are numbers, and lists become tuples where those are wanted.

    Raises:
        ValueError: it is of another kind; `where` names it.
    """
    if typing.get_origin(hint) is tuple:
        parts = [part for part in typing.get_args(hint) if part is not ...]
        many = len(parts) < len(typing.get_args(hint))
        if not isinstance(value, (list, tuple)) or not (many or len(value) == len(parts)):
            count = "numbers" if many else f"{len(parts)} numbers"
            raise ValueError(f"{where} is {value!r}; it must be a list of {count}")
        kinds = parts * len(value) if many else parts
        return tuple(checked(*pair, where) for pair in zip(value, kinds, strict=True))
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if hint is float:
        fits = type(value) in (int, float) and math.isfinite(value)
    if not fits:
        raise ValueError(f"{where} is {value!r}; it must be {_WORDS[hint]}")
    return value


def build(kind: type[_Kind], raw: Any, where: str) -> _Kind:
    """A dataclass out of an object's keys that it knows; those that are null keep their defaults.

    Raises:
        ValueError: it is no object, or a value is of another kind or out of its range; `where` names it.
    """
    hints = typing.get_type_hints(kind)
    given = checked({} if raw is None else raw, dict, where)
    values = {
        field.name: checked(given[field.name], hints[field.name], f"{where}.{field.name}")
        for field in fields(kind)  # type: ignore[arg-type]
        if given.get(field.name) is not None
    }
    return kind(**values)
