"""Colours that the colour-blind can tell apart (Okabe and Ito 2008), in a light and a dark form."""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
    """How a source of tokens is shown: colour alone never tells two apart, the letter does too."""

    letter: str
    light: str
    dark: str


SOURCE_LOOKS = {
    "phrase tree": Look("P", "#CC79A7", "#CC79A7"),
    "last window": Look("W", "#E69F00", "#E69F00"),
    "draft": Look("D", "#0072B2", "#56B4E9"),
    "end rule": Look("E", "#009E73", "#009E73"),
    "target": Look("T", "#D55E00", "#D55E00"),
}
"""By the word of `RoundRow.sources` and `origins`."""
OTHER_LOOK = Look("O", "#767676", "#999999")
"""Of a proposer with a word of its own."""


def look_of(source: str) -> Look:
    """A source's look."""
    return SOURCE_LOOKS.get(source, OTHER_LOOK)
