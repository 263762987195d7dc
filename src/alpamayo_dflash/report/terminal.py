"""Text of others, times and small curves, as a terminal shows them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise

_BARS = "▁▂▃▄▅▆▇█"
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def visible(text: str, most: int = 300) -> str:
    r"""A text of others in one line, where every character stands for itself.

    What a terminal would act on (control characters, marks of writing direction, line breaks) is written as
    Python writes it in a string: a right-to-left override is the six characters `\u202e`.

    Args:
        text: of a model, a file or a file's name.
        most: characters of it that are kept; of a longer text the rest is a "…".
    """
    kept = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in kept
    )


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """A curve in one line of block characters, from its least value to its greatest.

    Args:
        values: in order; each stretch of a longer curve is its mean.
        width: the most characters.
    """
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    edges = [place * len(finite) // count for place in range(count + 1)] if count else []
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    least, span = min(means), max(means) - min(means)
    if not span:
        return _BARS[0] * len(means)
    return "".join(_BARS[round((mean - least) / span * (len(_BARS) - 1))] for mean in means)


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    whole = max(0, round(seconds))
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def clock(moment: float, now: float) -> str:
    """A moment on this machine's clock, with its date where that is not today's.

    Args:
        moment: seconds since 1970.
        now: likewise.
    """
    there, here = time.localtime(moment), time.localtime(now)
    today = (there.tm_year, there.tm_yday) == (here.tm_year, here.tm_yday)
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M", there)
