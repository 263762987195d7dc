"""The benchmark's figures, and how far each may be off, from the raw timings alone."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PEAK_FLOP_PER_S = 989e12
"""Dense bfloat16 operations a second of an H100 or H200 (SXM), by NVIDIA's data sheets."""
SIX = 6
"""Samples of the figures for several."""
REPLAYED = (
    *("round_overhead", "round_six_over_one", "decode_six_over_one"),
    *("decode_vs_autoregressive", "decode_vs_transformers", "decode_vs_compiled"),
)
"""Keys whose timings are of texts with replayed proposals."""
_BASELINES = ("autoregressive", "compiled", "transformers")
WINDOW_REPLAYED = (
    *("window_ms", "window_six_over_one", "window_p99_over_p50", "window_overhead"),
    *("window_vs_autoregressive", "window_vs_compiled", "window_vs_transformers"),
    "vision_reuse_over_none",
)
"""Keys of whole windows, whose proposals are replayed."""
_RESAMPLES = 400
Figures = Callable[[Mapping[str, Any]], dict[str, float]]


def figures(raw: Mapping[str, Any]) -> dict[str, float]:
    """The results' keys; one whose arms were not timed is left out.

    Forwards and rounds by their medians, texts by their means: how many rounds a text takes is drawn.

    Args:
        raw: lists of milliseconds: `verify_ms` by rows, `draft_ms` by draft, `picks_ms` by its head on
            previous picks (older runs have none), `round_ms` by samples, `text_ms` by arm and samples,
            `prefill_ms` by arm; `text_rounds`, passes after the first token, like `text_ms`; what
            `round_rows` reads; `weight_bytes`, and the list `read_bytes_per_s`.
    """
    median, mean = statistics.median, statistics.fmean
    floor = raw["weight_bytes"] / median(raw["read_bytes_per_s"]) * 1e3
    verify, texts = raw["verify_ms"], raw["text_ms"]
    draft = median(next(iter(raw["draft_ms"].values())))
    one_pass = median(verify[str(round_rows(raw))])
    one, six = (median(raw["round_ms"][str(samples)]) for samples in (1, SIX))
    keys = {f"verify_{rows}_over_floor": median(times) / floor for rows, times in verify.items()}
    keys |= {
        "draft_over_verify": draft / one_pass,
        **_picks_figures(raw, one_pass),
        "round_overhead": (one - draft - one_pass) / one,
        "round_six_over_one": six / one,
        "decode_six_over_one": mean(texts[f"speculative_{SIX}"]) / mean(texts["speculative_1"]),
        "decode_vs_autoregressive": mean(texts["autoregressive_1"]) / mean(texts["speculative_1"]),
    }
    if "transformers_1" in texts:
        prefill = raw["prefill_ms"]
        keys["decode_vs_transformers"] = _text_over_ours(raw, "transformers_1")
        keys["prefill_vs_transformers"] = median(prefill["transformers"]) / median(prefill["project"])
    if texts.get("compiled_1"):
        keys["decode_vs_compiled"] = _text_over_ours(raw, "compiled_1")
    return {key: round(value, 4) for key, value in keys.items()}


def round_rows(raw: Mapping[str, Any]) -> int:
    """A sample's rows of a round; older runs do not say, and had as many as their block."""
    return int(raw.get("round_rows", raw["draft_shape"]["block_size"]))


def _picks_figures(raw: Mapping[str, Any], one_pass: float) -> dict[str, float]:
    """A draft with the choice of its tokens over a pass, by its head."""
    times: Mapping[str, Sequence[float]] = raw.get("picks_ms", {})
    return {f"picks_{kind}_head_over_verify": statistics.median(ms) / one_pass for kind, ms in times.items()}


def _text_over_ours(raw: Mapping[str, Any], arm: str) -> float:
    """An arm's texts over speculative ones.

    Its noise is its own, so its texts may end elsewhere: at as many passes as our loop's.
    """
    mean, texts, passes = statistics.fmean, raw["text_ms"], raw["text_rounds"]
    same = mean(passes["autoregressive_1"]) / mean(passes[arm])
    return same * mean(texts[arm]) / mean(texts["speculative_1"])


def distill_figures(raw: Mapping[str, Any]) -> dict[str, float]:
    """The keys of `bench-distill`; those beside an earlier revision only where that was timed.

    Args:
        raw: `windows`, and by arm in `arms` the `wall_s` of all windows and lists of milliseconds on the
            device: `vision_ms` and `prompt_ms`, of the earlier revision `prefill_ms`, both in one.
    """
    arms, keys = raw["arms"], {}
    for arm, mark in (("replayed", ""), ("autoregressive", "_ar"), ("before", "_before")):
        if arm in arms:
            found = arms[arm]
            lists = [found[name] for name in ("vision_ms", "prompt_ms", "prefill_ms") if name in found]
            keys[f"windows_per_s{mark}"] = raw["windows"] / found["wall_s"]
            keys[f"prompt_share_of_wall{mark}"] = sum(map(sum, lists)) / 1e3 / found["wall_s"]
    if "before" in arms:
        keys["over_before"] = keys["windows_per_s_ar"] / keys["windows_per_s_before"]
    keys["acceptance_length"] = arms["replayed"]["emitted"] / arms["replayed"]["passes"]
    return {key: round(value, 4) for key, value in keys.items()}


def window_figures(raw: Mapping[str, Any]) -> dict[str, float]:
    """The keys of `bench --window`; one whose arms were not timed is left out. Medians.

    Args:
        raw: of `bench.window.measured`.
    """
    keys = _whole_windows(raw) | _window_parts(raw) | _expert_figures(raw)
    return {key: round(value, 4) for key, value in keys.items()}


def format_parts(raw: Mapping[str, Any]) -> dict[str, Mapping[str, list[float]]]:
    """What `bench --beside` timed of both targets: by part, then `fp8` and `checkpoint`."""
    return {
        part: times
        for part, times in raw.items()
        if isinstance(times, Mapping) and isinstance(times.get("fp8"), list)
    }


def format_figures(raw: Mapping[str, Any]) -> dict[str, float]:
    """The ratios of `bench --beside`: the target in FP8 over the same in bfloat16. Medians.

    Args:
        raw: of `bench.formats`.
    """
    median = statistics.median
    return {
        f"{part.removesuffix('_ms').removesuffix('_1')}_over_bf16": round(
            median(times["fp8"]) / median(times["checkpoint"]), 4
        )
        for part, times in format_parts(raw).items()
    }


def _whole_windows(raw: Mapping[str, Any]) -> dict[str, float]:
    median, times = statistics.median, raw.get("window_ms", {})
    if not times:
        return {}
    one = median(times["1"])
    keys = {
        "window_ms": one,
        "window_six_over_one": median(times[str(SIX)]) / one,
        "window_overhead": median(raw["window_overhead"]["1"]),
        "window_p99_over_p50": p99(raw["equal_window_ms"]) / median(raw["equal_window_ms"]),
    }
    for arm in _BASELINES:
        theirs = raw.get(f"{arm}_window_ms", {}).get("1")
        if theirs:
            keys[f"window_vs_{arm}"] = median(theirs) / one
    if "reuse_window_ms" in raw:
        reuse = raw["reuse_window_ms"]
        keys["vision_reuse_over_none"] = median(reuse["twelve"]) / median(reuse["none"])
    return keys


def _window_parts(raw: Mapping[str, Any]) -> dict[str, float]:
    median, keys = statistics.median, {}
    for name, key in (("pinned", "preprocess_ms"), ("pageable", "preprocess_pageable_ms")):
        if name in raw.get("preprocess_ms", {}):
            keys[key] = median(raw["preprocess_ms"][name])
    for name, key in (("vision_ms", "vision_over_before"), ("prompt_pass_ms", "prompt_over_before")):
        if name in raw:
            keys[key] = median(raw[name]["now"]) / median(raw[name]["before"])
    return keys


def _expert_figures(raw: Mapping[str, Any]) -> dict[str, float]:
    median, times = statistics.median, raw.get("expert_ms", {})
    read = raw["steps"] * raw["expert_bytes"] / median(raw["read_bytes_per_s"]) * 1e3
    # A product's slow runs are the card's, not the work's: a floor takes a fast one.
    rate = third_quartile(raw["product_flop_per_s"])
    done = raw["steps"] * raw["expert_operations"][str(SIX)] / rate * 1e3
    keys = {}
    if "fused_1" in times:
        keys["expert_over_floor"] = median(times["fused_1"]) / read
        keys["expert_vs_plain"] = median(times["plain_1"]) / median(times["fused_1"])
    if f"fused_{SIX}" in times:
        keys["expert_six_over_floor"] = median(times[f"fused_{SIX}"]) / done
        keys["expert_six_vs_plain"] = median(times[f"plain_{SIX}"]) / median(times[f"fused_{SIX}"])
    return keys


def train_figures(raw: Mapping[str, Any]) -> dict[str, float]:
    """The keys of `bench --train`: of each case's largest step, and with `_64` of the small one. Medians.

    `mfu` is the operations that a step cannot do without over what the card could do in its time. Of each
    matrix of the layers 2 operations a block row forward and 4 backward; 2 of `fc` a context row; 4 of the
    frozen head a label row, forward and for the gradient of the states; and attention's. Rows that the last
    layer leaves out count, `fc`'s gradient and the keys of context rows do not.

    Args:
        raw: of `bench.train.run`: `cases` by name, each with `layer_weights`, `fc_weights`, `head_weights`
            and `steps`, small and most.
    """
    keys: dict[str, float] = {}
    for name, case in raw["cases"].items():
        for size, step in case["steps"].items():
            suffix = name if size == "most" else f"{name}_{step['blocks']}"
            seconds = statistics.median(step["step_ms"]) / 1e3
            operations = sum(train_operations(case, step).values())
            keys |= {
                f"mfu_{suffix}": operations / (PEAK_FLOP_PER_S * seconds),
                f"label_rows_per_s_{suffix}": step["label_rows"] / seconds,
                f"peak_gib_{suffix}": step["peak_bytes"] / 2**30,
                f"step_ms_{suffix}": 1e3 * seconds,
                f"blocks_{suffix}": step["blocks"],
            }
    return {key: round(value, 6 if key.startswith("mfu") else 4) for key, value in keys.items()}


def train_operations(case: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, float]:
    """The parts of a training step's operations, as `train_figures` counts them."""
    return {
        "layers": 6 * case["layer_weights"] * step["block_rows"],
        "fc": 2 * case["fc_weights"] * step["context_rows"],
        "head": 4 * case["head_weights"] * step["label_rows"],
        "attention": step["attention_operations"],
    }


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred exceeds."""
    return statistics.quantiles(values, n=100, method="inclusive")[-1]


def window_parts(raw: Mapping[str, Any], floor: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Median milliseconds of a window's parts by arm and samples ("ours_1"), as reports read them.

    Args:
        raw: whole windows by samples, and their parts by samples: `window_ms` and `window_parts_ms`, and with
            a baseline's name and `_` before `window_ms` and `parts_ms`. An arm that was not timed is
            left out.
        floor: of each part, with one sample.

    Returns:
        by arm, `whole` beside the parts; and `floor`, whose whole is the sum of its parts.
    """
    found = {}
    names = {"ours": ("window_ms", "window_parts_ms")}
    names |= {arm: (f"{arm}_window_ms", f"{arm}_parts_ms") for arm in _BASELINES}
    for arm, (whole, parts) in names.items():
        for samples, times in raw.get(whole, {}).items():
            found[f"{arm}_{samples}"] = medians({**raw[parts][samples], "whole": times})
    return found | {"floor": {**floor, "whole": round(sum(floor.values()), 6)}}


def third_quartile(values: Sequence[float]) -> float:
    """The value that a quarter of them exceed."""
    return statistics.quantiles(values, n=4, method="inclusive")[-1]


def coc_means(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean decode times by arm (milliseconds) of CoCs of the lengths that real ones have; [] if not timed."""
    return [
        {key: row[key] for key in ("quantile", "coc_tokens")}
        | {arm: round(statistics.fmean(times), 2) for arm, times in row["decode_ms"].items()}
        for row in raw.get("coc", [])
    ]


def spread(raw: Mapping[str, Any], of: Figures = figures) -> dict[str, list[float]]:
    """Of each figure the 2.5th and 97.5th percentile when every list of timings is drawn again from itself.

    The bootstrap of Efron ("Bootstrap methods: another look at the jackknife", 1979), with a fixed seed.
    """
    generator = random.Random(0)  # noqa: S311
    drawn = [of(_redrawn(raw, generator)) for _ in range(_RESAMPLES)]
    out = {}
    for key in drawn[0]:
        values = statistics.quantiles([each[key] for each in drawn], n=40, method="inclusive")
        out[key] = [round(values[0], 4), round(values[-1], 4)]
    return out


def _redrawn(value: Any, generator: random.Random) -> Any:
    if isinstance(value, Mapping):
        return {key: _redrawn(item, generator) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], float):
        return generator.choices(value, k=len(value))
    return value


def timing_quartiles(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Least, quartiles and most of every list of timings."""
    out: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, Mapping):
            out[name] = timing_quartiles(value)
        elif isinstance(value, list) and len(value) > 1 and isinstance(value[0], float):
            low, middle, high = statistics.quantiles(value, n=4)
            found = {"min": min(value), "q1": low, "median": middle, "q3": high, "max": max(value)}
            out[name] = {key: round(number, 4) for key, number in found.items()}
    return {name: value for name, value in out.items() if value}


def medians(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The median in the place of every list of timings."""
    return {
        name: medians(value) if isinstance(value, Mapping) else round(statistics.median(value), 6)
        for name, value in raw.items()
    }
