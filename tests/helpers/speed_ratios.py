"""The ratios of `make speed`: from times taken in turns to figures, and what is worse than before."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alpamayo_dflash.bench.figures import spread


@dataclass(frozen=True)
class Ratio:
    """One figure; smaller is better.

    Attributes:
        arm: what may get slower.
        base: what it is held to: a plain or an earlier form, or transformers.
        tolerance: how much worse than the kept one the ratio may be, as a part of it.
    """

    arm: str
    base: str
    tolerance: float


TEXTS = 8
"""Texts that take turns: a run of any length has the same ones equally often."""
# While other work took both cores, runs of one code differed by up to a fifth in decoding and in windows.
RATIOS = {
    "decode_host_over_autoregressive": Ratio("decode_host", "autoregressive_host", 0.2),
    "decode_device_over_autoregressive": Ratio("decode_device", "autoregressive_device", 0.2),
    "pass_over_transformers": Ratio("pass", "transformers_pass", 0.15),
    "window_over_plain": Ratio("window", "transformers_window", 0.2),
    "vision_over_before": Ratio("vision", "vision_before", 0.15),
    "prompt_over_before": Ratio("prompt", "prompt_before", 0.15),
}


def by_text(raw: Mapping[str, Sequence[float]]) -> dict[str, dict[str, list[float]]]:
    """The ratios of every turn, both of whose times were taken within a second of each other, by text.

    Args:
        raw: milliseconds by arm, one a turn; turn t is of text t modulo `TEXTS`.
    """
    found = {}
    for name, ratio in RATIOS.items():
        turns = [over / under for over, under in zip(raw[ratio.arm], raw[ratio.base], strict=True)]
        found[name] = {str(text): turns[text::TEXTS] for text in range(TEXTS)}
    return found


def means_of(ratios: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Of each ratio the mean over texts, which differ in their passes, of a text's median."""
    return {
        name: round(statistics.fmean(map(statistics.median, texts.values())), 4)
        for name, texts in ratios.items()
    }


def speed_figures(raw: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """`figures`, and `spread`: 95% of what they are when each text's turns are drawn again."""
    ratios = by_text(raw)
    return {"figures": means_of(ratios), "spread": spread(ratios, means_of)}


def worse(now: Mapping[str, float], kept: Mapping[str, float]) -> list[str]:
    """The ratios that are worse than the kept ones by more than their tolerance.

    Raises:
        ValueError: a ratio is not among the kept ones.
    """
    if missing := sorted(now.keys() - kept.keys()):
        raise ValueError(f"the kept results have no {', '.join(missing)}; renew them with --write")
    return [name for name, value in now.items() if value > most(name, kept)]


def most(name: str, kept: Mapping[str, float]) -> float:
    """What a ratio may be at most."""
    return kept[name] * (1 + RATIOS[name].tolerance)
