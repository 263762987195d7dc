"""Runs beside each other: clips matched by id, differences with intervals, and the clips that are missing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from alpamayo_dflash.common.bootstrap import Interval, median_interval, ratio_difference_interval
from alpamayo_dflash.common.fields import is_number
from alpamayo_dflash.report.page.data import Column, DataTable, Value, clip_link, of_objects
from alpamayo_dflash.report.page.runs import Run, Series
from alpamayo_dflash.report.page.sections import over

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A measure of two runs on the clips that both have.

    Attributes:
        measure: what, with its unit.
        clips: how many clips have it in both.
        first: the first run's value.
        other: the other's.
        difference: the other's less the first's, or the median of the clips' differences.
        interval: the difference's 95 %, bootstrap over clips; None of fewer than two clips.
    """

    measure: str
    clips: int
    first: float
    other: float
    difference: float
    interval: Interval | None


def matched(first: Series, other: Series) -> list[tuple[Row, Row]]:
    """The rows of the clips that both have, by id, in the first one's order."""
    rows = {row["clip_id"]: row for row in other.rows}
    return [(row, rows[row["clip_id"]]) for row in first.rows if row["clip_id"] in rows]


def differences(pairs: Sequence[tuple[Row, Row]]) -> list[Difference]:
    """The measures of matched clips, those that both have."""
    found = [
        _pooled("acceptance length, tokens a pass", pairs, "tokens_after_first", "passes"),
        _pooled("acceptance rate of drafted tokens", pairs, "accepted", "drafted"),
        *(
            _paired(f"{name} of DFlash, ms", pairs, partial(_time, key=f"{name}_ms"))
            for name in ("prefill", "decode", "action", "total")
        ),
        _paired("decode, times faster than autoregressive", pairs, _speedup),
        _paired("minADE, m", pairs, lambda row: (row.get("trajectory") or {}).get("min_ade_m")),
    ]
    return [each for each in found if each is not None]


def _pooled(measure: str, pairs: Sequence[tuple[Row, Row]], above: str, below: str) -> Difference | None:
    counts = [(one["acceptance"], other["acceptance"]) for one, other in pairs]
    if not counts or not all(name in count for pair in counts for count in pair for name in (above, below)):
        return None
    one = ([pair[0][above] for pair in counts], [pair[0][below] for pair in counts])
    other = ([pair[1][above] for pair in counts], [pair[1][below] for pair in counts])
    first, second = over(sum(one[0]), sum(one[1])), over(sum(other[0]), sum(other[1]))
    if first is None or second is None:
        return None
    return Difference(
        measure, len(counts), first, second, second - first, ratio_difference_interval(other, one)
    )


def _paired(
    measure: str, pairs: Sequence[tuple[Row, Row]], value: Callable[[Row], float | None]
) -> Difference | None:
    """The medians of a value, and the median of its differences clip by clip."""
    values = [(value(one), value(other)) for one, other in pairs]
    found = [(one, other) for one, other in values if is_number(one) and is_number(other)]
    if not found:
        return None
    apart = [other - one for one, other in found]
    return Difference(
        f"{measure}, median",
        len(found),
        statistics.median([float(one) for one, _ in found]),
        statistics.median([float(other) for _, other in found]),
        statistics.median(apart),
        median_interval(apart),
    )


def _time(row: Row, key: str) -> float | None:
    found: float | None = row["arms"].get("dflash", {}).get(key)
    return found


def _speedup(row: Row) -> float | None:
    arms = row["arms"]
    return over(arms.get("autoregressive", {}).get("decode_ms"), arms.get("dflash", {}).get("decode_ms"))


def difference_table(first: Run, others: Sequence[Run]) -> DataTable:
    """The differences of each other run from the first, of the greedy evaluations too where both have one."""
    objects: list[dict[str, Value]] = []
    for one, other in _pairs(first, others):
        for each in differences(matched(one, other)):
            low, high = each.interval or (None, None)
            objects.append(
                {
                    "run": other.name,
                    "first": one.name,
                    "measure": each.measure,
                    "clips": each.clips,
                    "before": each.first,
                    "after": each.other,
                    "difference": each.difference,
                    "low": low,
                    "high": high,
                    "relative": over(each.difference, each.first),
                    "relative_low": over(low, each.first),
                    "relative_high": over(high, each.first),
                }
            )
    columns = (
        Column("run", "run"),
        Column("first", "beside"),
        Column("measure", "measure"),
        Column("clips", "clips", "count"),
        Column("before", "first run", "number", 3),
        Column("after", "this run", "number", 3),
        Column("difference", "difference", "number", 3),
        Column("low", "95 % from", "number", 3),
        Column("high", "to", "number", 3),
        Column("relative", "relative", "share"),
        Column("relative_low", "from", "share"),
        Column("relative_high", "to", "share"),
    )
    note = (
        "On the clips that both have, matched by id. A median's difference is the median of the clips' own "
        "differences. Intervals: 95 %, bootstrap over clips, which are drawn together for both runs."
    )
    return of_objects("Differences from the first run", columns, objects, note)


def _pairs(first: Run, others: Sequence[Run]) -> list[tuple[Series, Series]]:
    return [(one, other) for run in others for one, other in zip(first.series, run.series, strict=False)]


def text_counts(first: Run, others: Sequence[Run]) -> DataTable:
    """On how many matched clips two runs wrote the same CoCs."""
    objects: list[dict[str, Value]] = []
    for one, other in _pairs(first, others):
        pairs = matched(one, other)
        same = sum(left["coc"] == right["coc"] for left, right in pairs)
        objects.append({"run": other.name, "first": one.name, "clips": len(pairs), "same": same})
    columns = (
        Column("run", "run"),
        Column("first", "beside"),
        Column("clips", "clips that both have", "count"),
        Column("same", "of them with the same CoCs", "count"),
    )
    return of_objects("Clips that match", columns, objects)


def missing(runs: Sequence[Run]) -> DataTable:
    """The clips that some runs have and others lack, with what is known of why."""
    objects: list[dict[str, Value]] = []
    links: list[str] = []
    compared = [(number, run) for number, run in enumerate(runs) if run.evaluation is not None]
    there = {number: {row["clip_id"] for row in run.rows} for number, run in compared}
    reasons = {number: {each["clip_id"]: each["error"] for each in run.failures} for number, run in compared}
    for clip in dict.fromkeys(row["clip_id"] for _, run in compared for row in run.rows):
        has = next(number for number, _ in compared if clip in there[number])
        for number, run in compared:
            if clip not in there[number]:
                reason = reasons[number].get(clip)
                why = f"failed: {reason}" if reason is not None else "not among its clips"
                objects.append({"clip": clip, "run": run.name, "why": why})
                links.append(clip_link(has, clip))
    columns = (Column("clip", "clip"), Column("run", "is missing in"), Column("why", "why"))
    return of_objects("Missing clips", columns, objects, links=links)


_ASKED = ("temperature", "top_p", "num_traj_samples", "sentence_end", "row_width", "dtype", "threads")


def unlike(first: Run, others: Sequence[Run]) -> list[str]:
    """In what the runs were asked otherwise, so that times or texts may differ for that alone."""
    found = []
    for run in others:
        if first.evaluation is None or run.evaluation is None:
            continue
        one, other = first.evaluation.get("settings") or {}, run.evaluation.get("settings") or {}
        found += [
            f"{run.name} has {name} {other.get(name)}, {first.name} has {one.get(name)}."
            for name in _ASKED
            if one.get(name) != other.get(name)
        ]
        here, there = (
            (each.get("provenance") or {}).get("device") for each in (first.evaluation, run.evaluation)
        )
        if here != there:
            found.append(f"{run.name} ran on {there}, {first.name} on {here}.")
    return found
