"""Numbers over clips, from the rows alone: medians, pooled acceptance, paired speed-ups, errors."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from alpamayo_dflash.clips.source import failure_kinds
from alpamayo_dflash.decode.observer import SPANS
from alpamayo_dflash.evaluate.config import ARMS
from alpamayo_dflash.evaluate.rows import ClipRow, Failure

TIMES = ("prefill_ms", "decode_ms", "action_ms", "total_ms")
PARTS = (*SPANS, "other")


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile, interpolated between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("quartiles of no values")
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def arm_summary(rows: Sequence[ClipRow], arm: str) -> dict[str, Any]:
    """Medians and quartiles of one arm's times over clips, and its tokens.

    `tokens` is the sum over clips and samples, `tokens_per_s` that sum over the sum of decode times.
    """
    found = [row["arms"][arm] for row in rows]
    summary: dict[str, Any] = {}
    spread: dict[str, list[float]] = {}
    for name in TIMES:
        low, middle, high = _rounded(quartiles([float(times[name]) for times in found]))  # type: ignore[literal-required]
        summary[name] = middle
        spread[name] = [low, high]
    tokens = sum(times["tokens"] for times in found)
    decode_s = sum(times["decode_ms"] for times in found) / 1000
    summary["tokens"] = tokens
    summary["tokens_per_s"] = round(tokens / decode_s, 3) if decode_s > 0 else None
    summary["quartiles"] = spread
    return summary


def speedup(rows: Sequence[ClipRow], time: str, slow: str) -> list[float]:
    """Quartiles over clips of the paired ratio of one arm's time to the speculative one's.

    A clip on which the latter took no time at all (a CoC of one token) is left out.
    """
    pairs = [(row["arms"][slow], row["arms"]["dflash"]) for row in rows]
    ratios = [one[time] / other[time] for one, other in pairs if other[time] > 0]  # type: ignore[literal-required]
    return _rounded(quartiles(ratios))


def speedups(rows: Sequence[ClipRow]) -> dict[str, Any]:
    """Decode and total speed-ups of the speculative loop: medians of paired ratios, and their quartiles."""
    summary: dict[str, Any] = {}
    spread: dict[str, list[float]] = {}
    for short, time in (("decode", "decode_ms"), ("total", "total_ms")):
        for slow in ("autoregressive", "transformers"):
            low, middle, high = speedup(rows, time, slow)
            summary[f"{short}_vs_{slow}"] = middle
            spread[f"{short}_vs_{slow}"] = [low, high]
    summary["quartiles"] = spread
    return summary


def pooled_acceptance(rows: Sequence[ClipRow]) -> dict[str, Any]:
    """Acceptance over all clips together.

    Returns:
        `acceptance_length`: tokens after the first over verify passes; `acceptance_rate`: accepted drafted
        tokens over drafted tokens; `passes_per_coc`; the counts that they come from. A ratio over nothing is
        None.
    """
    counts = {
        name: sum(row["acceptance"][name] for row in rows)
        for name in ("tokens_after_first", "passes", "drafted", "accepted")
    }
    samples = sum(len(row["coc"]) for row in rows)

    def ratio(above: int, below: int) -> float | None:
        return round(above / below, 4) if below else None

    return {
        "acceptance_length": ratio(counts["tokens_after_first"], counts["passes"]),
        "acceptance_rate": ratio(counts["accepted"], counts["drafted"]),
        "passes_per_coc": ratio(counts["passes"], samples),
        "counts": counts,
    }


def identity_counts(rows: Sequence[ClipRow]) -> dict[str, int]:
    """How many clips gave equal outputs, of how many that were checked; and how the other texts part."""
    checked = [row["identity"] for row in rows if "identity" in row]
    return {
        "greedy_identical": sum(found["greedy"] for found in checked),
        "sampled_identical": sum(found["sampled"] for found in checked),
        "autoregressive_equals_transformers": sum(
            found["autoregressive_equals_transformers"] for found in checked
        ),
        "of": len(checked),
        "near_ties": sum(found.get("near_ties", 0) for found in checked),
        "not_near_ties": sum(found.get("not_near_ties", 0) for found in checked),
    }


def trajectory_summary(rows: Sequence[ClipRow]) -> dict[str, Any] | None:
    """Mean minADE over the clips that have a future, beside constant velocity's; None if none has."""
    found = [row["trajectory"] for row in rows if "trajectory" in row]
    if not found:
        return None
    return {
        "min_ade_m": round(statistics.fmean(each["min_ade_m"] for each in found), 4),
        "constant_velocity_min_ade_m": round(
            statistics.fmean(each["constant_velocity_ade_m"] for each in found), 4
        ),
        "of": len(found),
    }


def named_summary(rows: Sequence[ClipRow]) -> dict[str, Any] | None:
    """Shares of CoCs that name the scene's manoeuvre, its cause, and both; None without facts."""
    found = [row["named"] for row in rows if "named" in row]
    if not found:
        return None
    return {
        "manoeuvre": round(sum(each["manoeuvre"] for each in found) / len(found), 4),
        "cause": round(sum(each["cause"] for each in found) / len(found), 4),
        "both": round(sum(each["manoeuvre"] and each["cause"] for each in found) / len(found), 4),
        "of": len(found),
    }


def parts_summary(rows: Sequence[ClipRow]) -> dict[str, Any] | None:
    """Decode split into its parts: mean ms a clip and share of the whole; None if it was not timed.

    Parts that the loop did not tell apart are left out: on a GPU a round is one part.
    """
    found = [row["parts_ms"] for row in rows if "parts_ms" in row]
    if not found:
        return None
    means = {part: statistics.fmean(each.get(part, 0.0) for each in found) for part in PARTS}
    means = {part: ms for part, ms in means.items() if ms > 0}
    whole = sum(means.values())
    return {
        part: {"ms": round(ms, 3), "share": round(ms / whole, 4) if whole > 0 else None}
        for part, ms in means.items()
    }


def sources_summary(rows: Sequence[ClipRow]) -> dict[str, int] | None:
    """How many tokens after the first each source gave, over all samples; None if that was not recorded."""
    if not all("rounds" in row for row in rows):
        return None
    rounds = (each for row in rows for sample in row["rounds"] for each in sample)
    return dict(Counter(origin for each in rounds for origin in each["origins"]).most_common())


def trace_summary(rows: Sequence[ClipRow]) -> dict[str, Any] | None:
    """What traces took, as means over the clips that have one; None if none has.

    `lacking` are the other clips, `unequal` those whose traced decode wrote other texts than the row's.
    """
    found = [row["trace"] for row in rows if "trace" in row]
    if not found:
        return None
    return {
        "clips": len(found),
        "lacking": len(rows) - len(found),
        "unequal": sum(not each["equal"] for each in found),
        "trace_bytes_per_clip": round(statistics.fmean(each["bytes"] for each in found)),
        "trace_ms_per_clip": round(statistics.fmean(each["ms"] for each in found), 3),
    }


def evaluation_summary(
    rows: Sequence[ClipRow], failures: Sequence[Failure], attempted: int
) -> dict[str, Any]:
    """The evaluation's JSON object, from its rows.

    Raises:
        ValueError: no clip was done; the message holds the first failure's reason.
    """
    if not rows:
        reason = f"; the first: {failures[0]['clip_id']}: {failures[0]['error']}" if failures else ""
        raise ValueError(f"none of {attempted} clips could be evaluated{reason}")
    arms = [arm for arm in ARMS if arm in rows[0]["arms"]]
    acceptance = pooled_acceptance(rows)
    result: dict[str, Any] = {
        "clips": {
            "attempted": attempted,
            "done": len(rows),
            "failed": len(failures),
            "kinds": failure_kinds(failures),
            "failures": list(failures),
        },
        "lossless": identity_counts(rows),
        "acceptance_length": acceptance["acceptance_length"],
        "acceptance_rate": acceptance["acceptance_rate"],
        "passes_per_coc": acceptance["passes_per_coc"],
        "acceptance_counts": acceptance["counts"],
        "draft_failures": sum(row["acceptance"].get("draft_failures", 0) for row in rows),
        "arms": {arm: arm_summary(rows, arm) for arm in arms},
        "speedup": speedups(rows) if len(arms) == 3 else None,
        "trajectory": trajectory_summary(rows),
        "coc_names": named_summary(rows),
        "decode_parts": parts_summary(rows),
        "sources": sources_summary(rows),
        "trace": trace_summary(rows),
    }
    return result
