"""The bootstrap over clips (Efron, "Bootstrap methods: another look at the jackknife", 1979)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
_SHOWN_RESAMPLES = 2_000
"""Of an interval that is only looked at; its ends then move by some percent of its width with the seed."""

Interval = tuple[float, float]


def drawn_clips(count: int, seed: int, resamples: int = RESAMPLES) -> npt.NDArray[np.int64]:
    """Indices of clips, drawn anew with replacement: [resamples, count]."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


@lru_cache(maxsize=8)
def _times_drawn(count: int, seed: int, resamples: int) -> npt.NDArray[np.float32]:
    """How often each clip is drawn: [resamples, count]; a sum over the drawn clips is then one product."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float32)


def median_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = _SHOWN_RESAMPLES
) -> Interval | None:
    """The 2.5th and 97.5th percentile of the median where the clips are drawn anew.

    Args:
        values: one a clip.
        seed: of the drawing.
        resamples: how often they are drawn.

    Returns:
        None for fewer than two clips, which have no spread.
    """
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    return _percentiles(np.median(array[drawn_clips(len(array), seed, resamples)], axis=1))


def ratio_interval(
    above: Sequence[float], below: Sequence[float], *, seed: int = 0, resamples: int = _SHOWN_RESAMPLES
) -> Interval | None:
    """The same of a sum over another: of a pooled ratio, or of a mean where `below` is all ones.

    Drawings in which the lower sum is 0 are left out.

    Args:
        above: one a clip.
        below: likewise, of the same clips.
        seed: of the drawing.
        resamples: how often they are drawn.

    Returns:
        None for fewer than two clips, or where the lower sum is 0 in every drawing.

    Raises:
        ValueError: the two are of different numbers of clips.
    """
    sums = _sums([above, below], seed, resamples)
    if sums is None:
        return None
    sums = sums[sums[:, 1] > 0]
    return _percentiles(sums[:, 0] / sums[:, 1]) if len(sums) else None


def ratio_difference_interval(
    one: tuple[Sequence[float], Sequence[float]],
    other: tuple[Sequence[float], Sequence[float]],
    *,
    seed: int = 0,
    resamples: int = _SHOWN_RESAMPLES,
) -> Interval | None:
    """The same of one pooled ratio less another over the same clips, which are drawn together.

    Args:
        one: the upper and the lower counts by clip.
        other: likewise, of the same clips in the same order.
        seed: of the drawing.
        resamples: how often they are drawn.

    Returns:
        None for fewer than two clips, or where a lower sum is 0 in every drawing.

    Raises:
        ValueError: the two are of different numbers of clips.
    """
    sums = _sums([*one, *other], seed, resamples)
    if sums is None:
        return None
    sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
    return _percentiles(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]) if len(sums) else None


def _sums(columns: Sequence[Sequence[float]], seed: int, resamples: int) -> npt.NDArray[np.float64] | None:
    """The sums over each drawing of clips: [resamples, columns]; None for fewer than two clips."""
    if len({len(column) for column in columns}) != 1:
        counts = " beside ".join(str(len(column)) for column in columns)
        raise ValueError(f"{counts} clips; they must be the same clips")
    count = len(columns[0])
    if count < 2:
        return None
    found: npt.NDArray[np.float64] = _times_drawn(count, seed, resamples) @ np.array(columns, np.float64).T
    return found


def _percentiles(values: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)
