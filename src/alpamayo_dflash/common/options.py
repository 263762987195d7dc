"""Checks of option values, with one wording: the name, the value, and what it must be."""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from typing import SupportsIndex

MOST_BLOCK = 64
"""The widest block that a draft may have."""

_GENERATOR_SEEDS = 2**63
"""Seeds below this, and not negative, are what torch and numpy take alike."""


def check_whole(**values: SupportsIndex | None) -> None:
    """Raise ValueError for the first value that is no whole number; None, an option left out, passes."""
    for name, value in values.items():
        try:
            if value is not None:
                operator.index(value)
        except TypeError:
            raise ValueError(f"{name} is {value!r}; it must be a whole number") from None


def check_at_least(least: float, /, **values: float | None) -> None:
    """Raise ValueError for the first value that is below `least` or not finite; None passes."""
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be at least {least}, and finite")


def check_positive(**values: int | None) -> None:
    """Raise ValueError for the first count that is below 1 or no whole number; None passes."""
    check_whole(**values)
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def check_above_zero(**values: float | None) -> None:
    """Raise ValueError for the first value that is not above 0 or not finite; None passes."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be above 0, and finite")


def check_range(least: float, most: float, /, **values: float | None) -> None:
    """Raise ValueError for the first value that does not lie in [least, most]; None passes."""
    for name, value in values.items():
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} is {value}; it must be {least} to {most}")


def check_fraction(**values: float) -> None:
    """Raise ValueError for the first value that does not lie between 0 and 1, both left out."""
    for name, value in values.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it must be above 0 and below 1")


def generator_seed(seed: int) -> int:
    """A user's seed, which may be any whole number, as one that torch's and numpy's generators take.

    Raises:
        ValueError: it is no whole number.
    """
    check_whole(seed=seed)
    if 0 <= seed < _GENERATOR_SEEDS:
        return operator.index(seed)
    digest = hashlib.blake2b(str(operator.index(seed)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _GENERATOR_SEEDS


def whole_numbers(text: str, name: str) -> list[int]:
    """Whole numbers above 0 out of an option's text.

    Raises:
        ValueError: it holds something else.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} is {text!r}; it must be whole numbers above 0 with commas between")
    return [int(part) for part in parts]


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Read a comma-separated list of layer indices; None stays None.

    Raises:
        ValueError: empty, not integers, negative, or not strictly ascending.
    """
    if text is None:
        return None
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"layers {text!r} must be integers separated by commas, such as 1,9,17") from None
    if layers[0] < 0 or any(a >= b for a, b in itertools.pairwise(layers)):
        raise ValueError(f"layers {text!r} must be ascending, each named once, from 0 up")
    return layers


def check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Raise ValueError for the first layer that the target does not have."""
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is out of range: the target has layers 0 to {num_layers - 1}")
