"""Values out of other people's JSON, checked against the kinds that they must be."""

from __future__ import annotations

import contextlib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NotRequired, TypeGuard, TypeVar

_Kind = TypeVar("_Kind")
_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_WHOLE = 2**63  # a whole number is one of 64 bits, as tensors and tables hold them
_FLOAT = 2**1023  # and one that stands for a float fits into one
_SHOWN = 200
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on every file system in use


def value_of(raw: Mapping[str, Any], key: str, kind: type[_Kind], default: Any = ..., *, where: str) -> _Kind:
    """A key's value, checked.

    Args:
        raw: an object of a JSON file.
        key: the key.
        kind: int, float, str, bool, list or dict, or what else `checked` knows.
        default: stands in where the key is absent or null; left out, the key must be there.
        where: the file, for messages.

    Raises:
        ValueError: the key is missing, or its value is of another kind.
    """
    value = raw.get(key)
    if value is None:
        if default is ...:
            raise ValueError(f"{where}: no {key}; it must be {_word(kind)}")
        value = default
    return typing.cast(_Kind, checked(value, kind, f"{where}: {key}"))


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Put a file's name before the message of a ValueError from inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def checked(value: Any, hint: Any, where: str) -> Any:
    """A value of a kind; whole numbers are numbers, and lists become tuples where those are wanted.

    Args:
        value: out of JSON.
        hint: int (of 64 bits), float (finite), str, bool, list, dict, None or Any; `list[…]`,
            `dict[str, …]`, `tuple[…]`, `Literal[…]` and unions of such; a TypedDict, whose other keys are
            let through.
        where: names the value in messages.

    Raises:
        ValueError: it is of another kind; `where` names it.
    """
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin is tuple:
        return _tuple(value, hint, where)
    if origin in (types.UnionType, typing.Union):
        return _one_of(value, typing.get_args(hint), where)
    if origin in (list, dict):
        return _filled(value, hint, where)
    if typing.is_typeddict(hint):
        return _keys(value, hint, where)
    if not _is(value, hint):
        raise ValueError(f"{where} is {shown(value)}; it must be {_word(hint)}")
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


def file_name(value: Any, where: str) -> str:
    """A name of a file in the folder of the file that says it: no path, nothing that no file system takes.

    Raises:
        ValueError: it is something else; `where` names it.
    """
    name = str(checked(value, str, where))
    plain = name.isprintable() and not set(name) & {"/", "\\"} and name not in ("", ".", "..")
    if not plain or len(name.encode("utf-8")) > _LONGEST_NAME:
        raise ValueError(f"{where} is {shown(name)}; it must be the name of a file in the same folder")
    return name


def path_text(value: Any, where: str) -> str:
    """A path that a file names, of a kind that the system takes.

    Raises:
        ValueError: it is something else; `where` names it.
    """
    text = str(checked(value, str, where))
    parts = [len(part.encode("utf-8")) for part in text.split("/")]
    if not text.isprintable() or max(parts) > _LONGEST_NAME or sum(parts) + len(parts) > _LONGEST_PATH:
        raise ValueError(f"{where} is {shown(text)}; it must be a path of printable characters, or shorter")
    return text


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number that a float can hold."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < _FLOAT)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a kind that holds no others."""
    if typing.get_origin(hint) is typing.Literal:
        return any(type(value) is type(each) and value == each for each in typing.get_args(hint))
    if hint is float:
        return is_number(value)
    if hint is int:
        return type(value) is int and -_WHOLE <= value < _WHOLE
    return hint in _WORDS and isinstance(value, hint)


def _word(hint: Any) -> str:
    """What a kind is called in messages."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_word, inner))
    if origin in (list, tuple):
        return f"a list, each {_word(inner[0])}"
    return "an object"


def _filled(value: Any, hint: Any, where: str) -> Any:
    """A list or an object whose values are all of one kind."""
    box, inner = typing.get_origin(hint), typing.get_args(hint)[-1]
    checked(value, box, where)
    pairs = value.items() if box is dict else enumerate(value)
    for place, each in pairs:
        if not _is(each, inner):  # a place's name is made only where it is wanted
            checked(each, inner, f"{where}[{shown(place)}]")
    return value


def _tuple(value: Any, hint: Any, where: str) -> tuple[Any, ...]:
    parts = [part for part in typing.get_args(hint) if part is not ...]
    many = len(parts) < len(typing.get_args(hint))
    if not isinstance(value, (list, tuple)) or not (many or len(value) == len(parts)):
        count = "numbers" if many else f"{len(parts)} numbers"
        raise ValueError(f"{where} is {shown(value)}; it must be a list of {count}")
    kinds = parts * len(value) if many else parts
    return tuple(checked(*pair, where) for pair in zip(value, kinds, strict=True))


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """A value of a union, whose kinds are told apart by their outer shape."""
    for kind in kinds:
        outer = dict if typing.is_typeddict(kind) else typing.get_origin(kind) or kind
        if kind is Any or _is(value, kind) or (outer in (list, dict) and isinstance(value, outer)):
            return checked(value, kind, where)
    raise ValueError(f"{where} is {shown(value)}; it must be {' or '.join(map(_word, kinds))}")


@functools.cache
def _hints(kind: Any) -> Mapping[str, tuple[Any, bool]]:
    """A TypedDict's keys: each one's kind, and whether it must be there."""
    found = {}
    for key, hint in typing.get_type_hints(kind, include_extras=True).items():
        free = typing.get_origin(hint) is NotRequired
        found[key] = (typing.get_args(hint)[0] if free else hint, not free)
    return found


def _keys(value: Any, kind: Any, where: str) -> Any:
    """An object with a TypedDict's keys."""
    checked(value, dict, where)
    for key, (hint, needed) in _hints(kind).items():
        if key in value:
            checked(value[key], hint, f"{where}.{key}")
        elif needed:
            raise ValueError(f"{where}: no {key}; it must be {_word(hint)}")
    return value
