"""Checks of option values, with one wording: the name, the value, and what it must be."""

from __future__ import annotations

import itertools


def numbers(text: str, name: str) -> list[int]:
    """Whole numbers above 0 out of an option's text.

    Raises:
        ValueError: it holds something else.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} is {text!r}; it must be whole numbers above 0 with commas between")
    return [int(part) for part in parts]


def check_positive(**values: int | float | None) -> None:
    """Raise ValueError for the first value that is below 1; None is let through."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def require_positive(**values: int) -> None:
    """Refuse counts below 1.

    Raises:
        ValueError: naming the count and its value.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def require_sampling(temperature: float, top_p: float) -> None:
    """Refuse a negative temperature and a nucleus outside (0, 1]."""
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


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
    """Refuse layers that the target does not have.

    Raises:
        ValueError: naming the first layer out of range and the range.
    """
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is out of range: the target has layers 0 to {num_layers - 1}")


def at_least(name: str, value: float, least: int) -> None:
    """Refuse a value below `least`."""
    if value < least:
        raise ValueError(f"{name} is {value}; it must be {least} or more")
