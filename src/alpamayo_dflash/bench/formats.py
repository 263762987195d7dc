"""`bench --beside`: a target in FP8 beside the same as its checkpoint holds it, in turns in one process.

Parts of a window and whole windows, the memory that the one in FP8 needs, and its texts with and without
proposals at one row width.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch

from alpamayo_dflash.bench.clocks import ceilings, fp8_ceiling, in_turns
from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.decode import rows_call, shapes
from alpamayo_dflash.bench.expert import expert_sizes, expert_steps
from alpamayo_dflash.bench.figures import SIX, format_figures, format_parts, medians, spread, timing_quartiles
from alpamayo_dflash.bench.floors import format_floors
from alpamayo_dflash.bench.setup import Bench, gpu
from alpamayo_dflash.bench.vision import ready
from alpamayo_dflash.bench.window import Windows
from alpamayo_dflash.common.artefacts import provenance, write_json
from alpamayo_dflash.common.graphs import CapturedCall
from alpamayo_dflash.common.machine import GpuMemory, current, gib
from alpamayo_dflash.decode.cache import per_sample_slots
from alpamayo_dflash.target.formats import OPTIONS

FP8: Final = "fp8"
STORED: Final = "checkpoint"
_ROWS = (8, 16, 48, 64)
_TOKENS = 24
_SAMPLED = 3
"""Sampled texts of a prompt whose losslessness is looked at, beside the greedy one."""
Calls = dict[str, dict[str, Callable[[], object]]]


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure, and write the results.

    Raises:
        ValueError: the target cannot be loaded, or the device is not there.
    """
    started = time.time()
    quantised = Bench(config)
    device = quantised.device
    memory = needed(quantised) if device.type == "cuda" else {}
    as_stored: dict[str, Any] = dict.fromkeys(OPTIONS, STORED)
    stored = Bench(replace(config, beside=False, window=True, **as_stored))
    benches = {FP8: quantised, STORED: stored}
    with torch.inference_mode(), current(device):
        raw: dict[str, Any] = ceilings(config.repeats, device, stored.target.dtype)
        raw |= fp8_ceiling(config.repeats, device)
        raw |= {"prompt_tokens": len(stored.prompt), "counts": {n: _counts(b) for n, b in benches.items()}}
        windows = {name: Windows(bench) for name, bench in benches.items()}
        for part, calls in _calls(benches, windows).items():
            raw[part] = in_turns(calls, config.repeats, device)
        raw |= whole(windows, config.texts)
    found: dict[str, Any] = {
        "figures": format_figures(raw) | memory,
        "spread": spread(raw, format_figures),
        "beside": medians(format_parts(raw)),
        "floors": format_floors(raw),
        "target_weights": {name: bench.target.weight_formats for name, bench in benches.items()},
        "lossless": None,
        "gpu": gpu(device),
    }

    def write() -> None:
        rest = {"timings": timing_quartiles(raw), "raw": raw, "provenance": provenance(config, started)}
        write_json(config.out, found | rest)

    write()  # what took minutes is kept, whatever happens to the rest
    if config.lossless_prompts:
        print(f"bench: timed; comparing texts on {config.lossless_prompts} prompts", file=sys.stderr)
        found["lossless"] = lossless(quantised)
        write()
    same = found["lossless"]
    return found | {"out": str(config.out), "passed": same is None or same["equal"] == same["texts"]}


def _counts(bench: Bench) -> dict[str, Any]:
    """What floors are counted from."""
    return shapes(bench) | expert_sizes(bench.target)


def needed(bench: Bench) -> dict[str, float]:
    """GiB on the device for windows of one sample and then of six, by a target that is there already.

    What the allocator has taken at most since, and what the device holds beside it: context and kernels.
    """
    torch.cuda.empty_cache()
    memory, found = GpuMemory(bench.device), {}
    with torch.inference_mode(), current(bench.device):
        windows = Windows(bench)
        for samples, key in ((1, "needed_gib"), (SIX, "needed_gib_six")):
            windows.timed(samples, 0)
            found[key] = gib(memory.reserved() + memory.context())
    return found


def _calls(benches: dict[str, Bench], windows: dict[str, Windows]) -> Calls:
    """By part and target what is timed: vision, the prompt's pass, passes of rows, and the expert's steps."""
    found: Calls = {"vision_ms": {}, "prompt_ms": {}, **{f"verify_{rows}_ms": {} for rows in _ROWS}}
    found |= {f"expert_{samples}_ms": {} for samples in (1, SIX)}
    for name, bench in benches.items():
        verifier = bench.decoder(None).verifier
        prompt = ready(bench.target, windows[name].prompt)
        seen = verifier.vision(prompt)
        found["vision_ms"][name] = partial(verifier.vision, prompt)
        found["prompt_ms"][name] = partial(verifier.read, prompt, seen)
        for rows in _ROWS:
            found[f"verify_{rows}_ms"][name] = _rows_call(bench, rows)
        for samples in (1, SIX):
            found[f"expert_{samples}_ms"][name] = expert_steps(
                bench.target, bench.config.text_tokens, samples
            )
    return found


def _rows_call(bench: Bench, rows: int) -> Callable[[], object]:
    """`rows_call`, captured on a GPU."""
    device, verifier = bench.device, bench.decoder(None).verifier
    call = rows_call(verifier, verifier.prefill(bench.prompt), rows, per_sample_slots(rows, 0))
    if device.type != "cuda":
        return call
    captured = CapturedCall(call)

    def replay(_kept: object = call) -> None:
        """A graph does not keep the tensors that it reads; the call does."""
        captured.replay()

    return replay


def whole(windows: dict[str, Windows], texts: int) -> dict[str, Any]:
    """Windows from frames to a trajectory, in turns; texts that take both targets as many rounds."""
    each: dict[str, list[Any]] = {name: [] for name in windows}
    for seed in range(texts + 1):
        for name, of_target in windows.items():
            each[name].append(of_target.timed(1, seed))
    pairs = list(zip(each[FP8], each[STORED], strict=True))[1:]
    pairs = [pair for pair in pairs if pair[0].rounds == pair[1].rounds]
    return {
        "window_ms": {name: [pair[i].wall_ms for pair in pairs] for i, name in enumerate((FP8, STORED))},
        "window_parts_ms": {
            name: {part: [pair[i].parts_ms[part] for pair in pairs] for part in pairs[0][i].parts_ms}
            for i, name in enumerate((FP8, STORED))
        },
        "window_rounds": [pair[0].rounds for pair in pairs],
    }


def lossless(bench: Bench) -> dict[str, Any]:
    """Texts of random prompts with replayed proposals against those token by token, at one row width."""
    config = bench.config
    width = config.row_width or config.block_size
    alone = bench.decoder(None, width)
    fast, replay = bench.replaying(width)
    found = {"prompts": config.lossless_prompts, "texts": 0, "equal": 0, "row_width": width}
    for index in range(config.lossless_prompts):
        prompt = bench.random_prompt(index)
        with torch.inference_mode():
            seen = bench.target.see(prompt)
            read = [decoder.verifier.read(prompt, seen) for decoder in (alone, fast)]
        for temperature, samples in ((0.0, 1), (config.temperature, _SAMPLED)):
            options = bench.options(samples, index, _TOKENS) | {"temperature": temperature}
            expected = alone.generate(read[0], **options).token_ids
            replay.load(expected, index)
            got = fast.generate(read[1], **options).token_ids
            found["texts"] += samples
            found["equal"] += sum(one == other for one, other in zip(expected, got, strict=True))
    return found
