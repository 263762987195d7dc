"""`bench --window`: whole windows, from camera frames to a trajectory on the host, and each of their parts.

Texts are of a fixed length, their proposals replayed (see `replay`). Every part is timed by events inside the
window, and beside it in its older form or its floor, in turns.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alpamayo_dflash.bench.baselines import compiled_windows, eager_windows
from alpamayo_dflash.bench.cards import read_cards
from alpamayo_dflash.bench.clocks import ceilings
from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.decode import shapes
from alpamayo_dflash.bench.expert import expert, expert_counts
from alpamayo_dflash.bench.figures import (
    SIX,
    WINDOW_REPLAYED,
    spread,
    timing_quartiles,
    window_figures,
    window_parts,
)
from alpamayo_dflash.bench.floors import window_floors
from alpamayo_dflash.bench.images import preprocess
from alpamayo_dflash.bench.profile import profile_window
from alpamayo_dflash.bench.prompt import prompt_pass
from alpamayo_dflash.bench.setup import Bench, gpu
from alpamayo_dflash.bench.vision import vision
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.artefacts import provenance, write_json
from alpamayo_dflash.common.machine import Clock, current
from alpamayo_dflash.decode.decoder import Result, SpeculativeDecoder
from alpamayo_dflash.report.tables import WINDOW_PARTS
from alpamayo_dflash.standins.untrained import noise_window
from alpamayo_dflash.target.images import staged

_WARM = 3
_FEWER = 3
"""Windows of the baselines, which are slow, are this many times fewer than the repeats."""
_REUSE_MIB = 512
_QUICK_TEXTS, _QUICK_WINDOWS = 12, 40
_SEEDS = 8
"""Texts of equal rounds that take turns where the spread of a window's time is looked at."""


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure, and write the results.

    Raises:
        ValueError: the target cannot be loaded or the device is not there.
    """
    started = time.time()
    bench = Bench(config)
    with torch.inference_mode(), current(bench.device):
        windows = Windows(bench)
        raw = measured(bench, windows)
        looked = profile_window(lambda: windows.timed(1, 0), bench.device)
        if config.transformers and not config.quick:
            raw |= baselines(bench)  # last: compiling takes CUDA graphs' memory over
    floor = window_floors(raw)
    found = {
        "figures": window_figures(raw),
        "spread": spread(raw, window_figures),
        "floors": floor,
        "parts": window_parts(raw, floor["parts"]),
        "cards": read_cards(),
        "replayed": list(WINDOW_REPLAYED),
        "coc_lengths": [],
        "target_weights": bench.target.weight_formats,
    }
    shown = found | {"gpu": gpu(bench.device)}
    kept = shown | {
        "timings": timing_quartiles(raw),
        "raw": raw,
        "profile": looked,
    }
    del kept["cards"]
    write_json(config.out, kept | {"provenance": provenance(config, started)})
    return shown | {"out": str(config.out)}


def measured(bench: Bench, windows: Windows) -> dict[str, Any]:
    """All raw timings; with `quick` those of our windows and the floors alone."""
    config = bench.config
    raw: dict[str, Any] = ceilings(config.repeats, bench.device, bench.target.dtype)
    raw |= counted(bench) | preprocess(bench.target, config.repeats) | windows.raw()
    if config.quick:
        return raw
    raw |= autoregressive(bench, windows.window)
    raw |= vision(bench.target, windows.prompt, config.repeats)
    raw |= reuse(bench, windows)
    raw |= prompt_pass(windows.decoder.verifier, windows.prompt, config.repeats)
    raw |= expert(config, bench.target)
    return raw


def baselines(bench: Bench) -> dict[str, Any]:
    """Raw timings of transformers' own windows, eager and compiled."""
    config, window = bench.config, noise_window(bench.config.seed)
    how: dict[str, Any] = {
        "tokens": config.text_tokens,
        "temperature": config.temperature,
        "repeats": max(3, config.repeats // _FEWER),
    }
    eager = eager_windows(bench.target, window, **how)
    return eager | compiled_windows(bench.target, window, eager, **how)


def counted(bench: Bench) -> dict[str, Any]:
    """What the floors of a window's parts are counted from."""
    return {
        **shapes(bench),
        **expert_counts(bench.target),
        "draft_layers": bench.draft.config.num_layers,
        "round_rows": bench.round_rows,
        "prompt_tokens": len(bench.prompt),
    }


@dataclass(frozen=True)
class Timed:
    """One window: its wall time, the device's time by part, and the verify passes of its text."""

    wall_ms: float
    parts_ms: dict[str, float]
    rounds: int

    @property
    def overhead(self) -> float:
        """What of the wall time lies in no part."""
        return 1 - sum(self.parts_ms.values()) / self.wall_ms


class Windows:
    """Windows decoded with replayed proposals, whole.

    Args:
        bench: target, draft and replay.
        reuse_mib: memory for images seen before.

    Attributes:
        decoder: what decodes them.
        window: the one that is decoded, its frames in pinned memory; they may be written over.
        prompt: of it.
    """

    def __init__(self, bench: Bench, *, reuse_mib: int = 0) -> None:
        self._bench = bench
        self.decoder, self._replay = bench.replaying(reuse_mib=reuse_mib)
        self.window = staged(noise_window(bench.config.seed), bench.device)
        self.prompt = bench.target.prompt(self.window)
        self._known: dict[tuple[int, int], list[list[int]]] = {}

    def raw(self) -> dict[str, Any]:
        """Windows with one sample and with six, each with a text of its own, and many of equal rounds."""
        config = self._bench.config
        texts, windows = config.texts, config.windows
        if config.quick:
            texts, windows = min(texts, _QUICK_TEXTS), min(windows, _QUICK_WINDOWS)
        found = {samples: self._each(samples, range(texts)) for samples in (1, SIX)}
        counts = Counter(each.rounds for each in found[1])
        rounds, _ = counts.most_common(1)[0]
        seeds = [seed for seed, each in enumerate(found[1]) if each.rounds == rounds][:_SEEDS]
        many = [seeds[index % len(seeds)] for index in range(windows)]
        return {
            "text_tokens": config.text_tokens,
            "window_ms": {str(samples): [each.wall_ms for each in kept] for samples, kept in found.items()},
            "window_parts_ms": {str(samples): _by_part(kept) for samples, kept in found.items()},
            "window_overhead": {
                str(samples): [round(each.overhead, 5) for each in kept] for samples, kept in found.items()
            },
            "window_rounds": {
                str(samples): [each.rounds for each in kept] for samples, kept in found.items()
            },
            "equal_rounds": rounds,
            "equal_window_ms": [each.wall_ms for each in self._each(1, many)],
        }

    def _each(self, samples: int, seeds: Sequence[int]) -> list[Timed]:
        for _ in range(_WARM):
            self.timed(samples, seeds[0])
        return [self.timed(samples, seed) for seed in seeds]

    def timed(self, samples: int, seed: int, known: list[list[int]] | None = None) -> Timed:
        """From frames to the trajectory on the host.

        Args:
            samples: S.
            seed: of text and trajectory.
            known: what the target writes; left out, it is asked first, once for all calls.
        """
        if known is None:
            if (samples, seed) not in self._known:
                self._known[samples, seed] = self.text(samples, seed)
            known = self._known[samples, seed]
        self._replay.load(known, seed)
        found, result = timed(self._bench, self.decoder, self.window, samples, seed)
        if result.token_ids != known:
            raise RuntimeError(f"the same window and seed gave {known} and then {result.token_ids}")
        return found

    def text(self, samples: int, seed: int) -> list[list[int]]:
        """What the target writes at this width of rows; see `setup.replayed`."""
        self._replay.load([[0]], seed)
        known = self._generate(samples, seed).token_ids
        self._replay.load(known, seed)
        return self._generate(samples, seed).token_ids

    def _generate(self, samples: int, seed: int) -> Result:
        return self.decoder.generate(self.window, **_options(self._bench, samples, seed))


def timed(
    bench: Bench, decoder: SpeculativeDecoder, window: Window, samples: int, seed: int
) -> tuple[Timed, Result]:
    """A window's times, from its frames to the trajectory on the host, and its result."""
    clock = Clock(bench.device)
    start = clock.now_ms()
    result = decoder.generate(window, **_options(bench, samples, seed))
    assert result.pred_xyz is not None
    result.pred_xyz.cpu()
    wall = clock.now_ms() - start
    parts = {part: round(ms, 4) for part, ms in result.timings.parts.items()}
    return Timed(round(wall, 4), parts, result.rounds), result


def _options(bench: Bench, samples: int, seed: int) -> dict[str, Any]:
    return bench.options(samples, seed, bench.config.text_tokens) | {"trajectories": True}


def autoregressive(bench: Bench, window: Window) -> dict[str, Any]:
    """Raw timings of our own windows without a draft, one token a pass."""
    decoder, repeats = bench.decoder(None), bench.config.repeats
    raw: dict[str, Any] = {"autoregressive_window_ms": {}, "autoregressive_parts_ms": {}}
    for samples in (1, SIX):
        each = [timed(bench, decoder, window, samples, seed)[0] for seed in range(repeats + _WARM)]
        raw["autoregressive_window_ms"][str(samples)] = [one.wall_ms for one in each[_WARM:]]
        raw["autoregressive_parts_ms"][str(samples)] = _by_part(each[_WARM:])
    return raw


def reuse(bench: Bench, plain: Windows) -> dict[str, Any]:
    """Windows of which three quarters of the images were seen before, and of which none was, in turns.

    A stream's window shares all but the newest frame of each camera with the one before.
    """
    reusing, before = Windows(bench, reuse_mib=_REUSE_MIB), plain.window.frames.copy()
    first = noise_window(bench.config.seed).frames[:, :1]
    per_camera = reusing.window.frames.shape[1]
    steps = bench.config.repeats
    # No frame of one kind is one of the other's.
    starts = {"twelve": lambda step: step, "none": lambda step: steps + per_camera * (step + 1)}
    times: dict[str, list[float]] = {name: [] for name in starts}
    seen: dict[str, list[int]] = {name: [] for name in starts}
    for step in range(steps + _WARM):
        for name, start in starts.items():
            numbers = np.arange(start(step), start(step) + per_camera)
            marks = np.stack((numbers % 256, numbers // 256, numbers % 256), axis=-1).astype(np.uint8)
            frames = first ^ marks[:, None, None]
            for windows in (plain, reusing):
                windows.window.frames[:] = frames
            hits = reusing.decoder.verifier.vision.hits
            found = reusing.timed(1, step, plain.text(1, step))
            times[name].append(found.wall_ms)
            seen[name].append(reusing.decoder.verifier.vision.hits - hits)
    plain.window.frames[:] = before
    return {
        "reuse_window_ms": {name: found[_WARM:] for name, found in times.items()},
        "reuse_hits": {name: found[_WARM:] for name, found in seen.items()},
    }


def _by_part(found: Sequence[Timed]) -> dict[str, list[float]]:
    return {part: [each.parts_ms[part] for each in found] for part in WINDOW_PARTS}
