"""The choice of taps from the two scores, as a pure function, and the artefact that carries it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from alpamayo_dflash.common.artefacts import read_json

CHOICE_FILE = "layers.json"

RULE = (
    "Each candidate layer gets a progress between 0 and 1: the mean of its cosine to the last layer and of "
    "its fall in early-exit cross-entropy, each scaled so that the candidates span 0 to 1. With n taps the "
    "levels 1/n, 2/n, ... 1 are matched by n ascending, distinct layers so that the sum of the distances "
    "between progress and level is least; between equals the later layers win. Taps thus lie where the "
    "answer takes shape: evenly over the depth if it does so evenly, close together at the end if it does so "
    "late. The last layer is no candidate by default: its state at the position before the anchor says the "
    "anchor, which the block already holds."
)


def progress(
    cosine: Sequence[float], early_exit_ce: Mapping[int, float], candidates: Sequence[int]
) -> dict[int, float]:
    """How far each candidate layer is on the way to the target's answer.

    Args:
        cosine: by layer, the cosine of its mean state to the last layer's mean state.
        early_exit_ce: by layer, nats a token; holds at least the candidates.
        candidates: the layers to place between 0 and 1.

    Returns:
        Layer to progress in [0, 1], rounded so that the last bits of a sum's order decide nothing.
    """
    near = _scaled([cosine[layer] for layer in candidates])
    sure = _scaled([-early_exit_ce[layer] for layer in candidates])
    return {layer: round((a + b) / 2, 9) for layer, a, b in zip(candidates, near, sure, strict=True)}


def _scaled(values: Sequence[float]) -> list[float]:
    """Scale values to 0 ... 1; all 1 where they are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 1.0 for value in values]


def choose_taps(progress_of: Mapping[int, float], count: int) -> tuple[int, ...]:
    """Choose taps whose progress is spread evenly (see `RULE`), by dynamic programming.

    Args:
        progress_of: candidate layer to progress.
        count: number of taps.

    Returns:
        `count` layers, ascending.

    Raises:
        ValueError: fewer candidates than taps.
    """
    layers = sorted(progress_of)
    if not 1 <= count <= len(layers):
        raise ValueError(f"cannot choose {count} taps among {len(layers)} candidate layers {layers}")
    # best[i]: cost and taps of the cheapest choice of `step` taps among the first i layers; None if none is.
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ())] * (len(layers) + 1)
    for step in range(1, count + 1):
        level = step / count
        following: list[tuple[float, tuple[int, ...]] | None] = [None] * (len(layers) + 1)
        for index, layer in enumerate(layers):
            following[index + 1] = following[index]
            before = best[index]
            if before is None:
                continue
            cost = round(before[0] + abs(progress_of[layer] - level), 9)
            known = following[index]
            if known is None or cost <= known[0]:  # `<=`: the later layer wins a tie
                following[index + 1] = (cost, (*before[1], layer))
        best = following
    last = best[len(layers)]
    assert last is not None
    return last[1]


def reasons(
    taps: Sequence[int],
    progress_of: Mapping[int, float],
    cosine: Sequence[float],
    early_exit_ce: Mapping[int, float],
) -> list[str]:
    """One sentence for each tap: what it stands for and its scores."""
    return [
        f"layer {tap}: progress {progress_of[tap]:.3f} for level {step / len(taps):.3f} "
        f"(cosine {cosine[tap]:.3f}, early-exit cross-entropy {early_exit_ce[tap]:.3f})"
        for step, tap in enumerate(taps, start=1)
    ]


def read_choice(path: Path | str) -> tuple[int, ...]:
    """Read the chosen taps from `layers.json` or from the folder that holds it.

    Raises:
        ValueError: no such file, or it holds no ascending list of layers; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHOICE_FILE
    content = read_json(path)
    taps = content.get("target_layers") if isinstance(content, dict) else None
    if not isinstance(taps, list) or not taps or any(type(tap) is not int or tap < 0 for tap in taps):
        raise ValueError(f"{path}: target_layers is {taps!r}; it must be a list of layer indices")
    if any(a >= b for a, b in itertools.pairwise(taps)):
        raise ValueError(f"{path}: target_layers {taps} is not ascending, each layer once")
    return tuple(taps)
