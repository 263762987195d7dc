"""The page's summary: medians and pooled ratios with intervals over clips, and where they come from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from alpamayo_dflash.common.bootstrap import Interval, median_interval, ratio_interval
from alpamayo_dflash.common.fields import is_number
from alpamayo_dflash.report.page.data import Column, DataTable, Measured, Value, of_objects
from alpamayo_dflash.report.page.runs import Run, Series
from alpamayo_dflash.report.page.sections import over
from alpamayo_dflash.report.tables import ARM_NAMES, WORLD_FIGURES

TIMES = {
    "prefill_ms": "prefill, ms",
    "decode_ms": "decode, ms",
    "action_ms": "action, ms",
    "total_ms": "total, ms",
}
_NOTE = "In brackets: 95 %, bootstrap over clips."


def summary(series: Sequence[Series]) -> DataTable:
    """The measures of each evaluation, a column each."""
    found = [_measures(each) for each in series]
    columns = (
        Column("measure", "measure"),
        *(Column(f"s{number}", each.name) for number, each in enumerate(series)),
    )
    names = dict.fromkeys(name for each in found for name in each)
    rows = tuple((name, *(each.get(name, "–") for each in found)) for name in names)
    return DataTable("Summary", columns, rows, _NOTE, sortable=False)


def _measures(series: Series) -> dict[str, Value]:
    """A series' measures by name, as text; those that it has not are left out."""
    result, rows = series.result, series.rows
    counts = [row["acceptance"] for row in rows]
    found: dict[str, Value] = {}

    def add(name: str, value: Any, interval: Interval | None, column: Column) -> None:
        if is_number(value):
            found[name] = column.shown(Measured.of(value, interval))

    if "clips" in result:
        found["clips done of attempted"] = f"{result['clips']['done']} of {result['clips']['attempted']}"
    add(
        "acceptance length, tokens a pass",
        result["acceptance_length"],
        _pooled(counts, "tokens_after_first", "passes"),
        _NUMBER,
    )
    add(
        "acceptance rate of drafted tokens",
        result["acceptance_rate"],
        _pooled(counts, "accepted", "drafted"),
        _SHARE,
    )
    passes = ratio_interval([count["passes"] for count in counts], [len(row["coc"]) for row in rows])
    add("passes a CoC", result.get("passes_per_coc"), passes, _NUMBER)
    for arm, times in result["arms"].items():
        add(f"decode of {ARM_NAMES[arm]}, ms", times["decode_ms"], _median(rows, arm, "decode_ms"), _TENTHS)
    for key, name in _SPEEDUPS.items():
        time, _, arm = key.partition("_vs_")
        add(
            name, (result["speedup"] or {}).get(key), median_interval(ratios(rows, f"{time}_ms", arm)), _TIMES
        )
    errors = [row["trajectory"] for row in rows if row.get("trajectory")]
    trajectory = result.get("trajectory") or {}
    for key, own, name in (
        ("min_ade_m", "min_ade_m", "minADE, m, mean"),
        ("constant_velocity_min_ade_m", "constant_velocity_ade_m", "constant velocity's ADE, m, mean"),
    ):
        interval = ratio_interval([error[own] for error in errors], [1.0] * len(errors))
        add(name, trajectory.get(key), interval, _NUMBER)
    named = [row["named"] for row in rows if row.get("named")]
    both = ratio_interval([each["manoeuvre"] and each["cause"] for each in named], [1.0] * len(named))
    add(
        "CoC names the scene's manoeuvre and cause", (result.get("coc_names") or {}).get("both"), both, _SHARE
    )
    lossless = result.get("lossless")
    if lossless and lossless["of"]:
        names = ("greedy_identical", "sampled_identical", "autoregressive_equals_transformers")
        found["clips equal: greedy, sampled, transformers"] = (
            f"{', '.join(str(lossless[name]) for name in names)} of {lossless['of']}"
        )
    traced = result.get("trace")
    if traced:
        found["trace a clip"] = (
            f"{traced['trace_bytes_per_clip'] / 1000:,.1f} kB, {traced['trace_ms_per_clip']:,.0f} ms"
        )
    return found


_NUMBER = Column("", "", "number", 2)
_TENTHS = Column("", "", "number", 1)
_TIMES = Column("", "", "times", 2)
_SHARE = Column("", "", "share")
_SPEEDUPS = {
    "decode_vs_autoregressive": "decode, times faster than autoregressive",
    "decode_vs_transformers": "decode, times faster than transformers",
    "total_vs_autoregressive": "whole clip, times faster than autoregressive",
    "total_vs_transformers": "whole clip, times faster than transformers",
}


def _pooled(counts: Sequence[Mapping[str, Any]], above: str, below: str) -> Interval | None:
    if not all(above in count and below in count for count in counts):
        return None
    return ratio_interval([count[above] for count in counts], [count[below] for count in counts])


def _median(rows: Sequence[Mapping[str, Any]], arm: str, time: str) -> Interval | None:
    values = [row["arms"][arm].get(time) for row in rows if arm in row["arms"]]
    return median_interval([value for value in values if is_number(value)])


def ratios(rows: Sequence[Mapping[str, Any]], time: str, arm: str) -> list[float]:
    """How many times longer an arm took than DFlash, clip by clip, where both were timed."""
    pairs = [(row["arms"].get(arm, {}).get(time), row["arms"].get("dflash", {}).get(time)) for row in rows]
    return [ratio for slow, fast in pairs if (ratio := over(slow, fast)) is not None]


def arms(series: Sequence[Series]) -> DataTable:
    """The times of each arm."""
    objects: list[dict[str, Value]] = []
    for each in series:
        for arm, times in each.result["arms"].items():
            found: dict[str, Value] = {"series": each.name, "arm": ARM_NAMES[arm]}
            for name in TIMES:
                found[name] = Measured.of(times[name], _median(each.rows, arm, name))
            rows = [row["arms"][arm] for row in each.rows if arm in row["arms"]]
            rate = ratio_interval([row["tokens"] for row in rows], [row["decode_ms"] / 1000 for row in rows])
            found["rate"] = (
                None if times["tokens_per_s"] is None else Measured.of(times["tokens_per_s"], rate)
            )
            objects.append(found)
    columns = (
        Column("series", "run"),
        Column("arm", "arm"),
        *(Column(key, label, "number", 1) for key, label in TIMES.items()),
        Column("rate", "tokens/s of decode", "number", 1),
    )
    note = f"Medians over clips; tokens/s are all tokens over all decode time. {_NOTE}"
    return of_objects("Times of the arms", columns, objects, note)


def bench_figures(runs: Sequence[Run]) -> list[DataTable]:
    """The figures of each benchmark."""
    tables = []
    for run in runs:
        figures = (run.bench or {}).get("figures") or {}
        spread = (run.bench or {}).get("spread") or {}
        replayed = (run.bench or {}).get("replayed") or []
        objects: list[dict[str, Value]] = [
            {
                "figure": name,
                "value": Measured.of(value, spread.get(name)),
                "replayed": "replayed" if name in replayed else "",
            }
            for name, value in figures.items()
            if is_number(value)
        ]
        columns = (
            Column("figure", "figure"),
            Column("value", "value", "number", 3),
            Column("replayed", "how"),
        )
        if objects:
            note = "In brackets: 95 %, bootstrap over timings."
            tables.append(of_objects(f"Figures of {run.name}", columns, objects, note))
    return tables


def world(runs: Sequence[Run]) -> list[DataTable]:
    """The synthetic world's figures beside their bounds."""
    tables = []
    for run in runs:
        result = run.evaluation or {}
        shipped, here, bounds = (result.get(name) or {} for name in ("world", "world_here", "world_bounds"))
        if not shipped:
            continue
        objects: list[dict[str, Value]] = [
            {
                "figure": text,
                "shipped": shipped[name],
                "here": here.get(name),
                "low": bounds[name][0] if name in bounds else None,
                "high": bounds[name][1] if name in bounds else None,
            }
            for name, text in WORLD_FIGURES.items()
        ]
        columns = (
            Column("figure", "figure"),
            Column("shipped", "shipped", "share"),
            Column("here", "this run", "share"),
            Column("low", "bounds from", "share"),
            Column("high", "to", "share"),
        )
        tables.append(of_objects(f"The synthetic world: {run.name}", columns, objects))
    return tables


_DIFFERENT = (
    "temperature",
    "top_p",
    "num_traj_samples",
    "sentence_end",
    "block_size",
    "row_width",
    "dtype",
    "threads",
)


def origins(runs: Sequence[Run]) -> DataTable:
    """Where the numbers come from, a column a run."""
    columns = (Column("what", "what"), *(Column(f"r{number}", run.name) for number, run in enumerate(runs)))
    found = [_origin(run) for run in runs]
    names = dict.fromkeys(name for each in found for name in each)
    rows = tuple((name, *(each.get(name, "–") for each in found)) for name in names)
    return DataTable("Where it comes from", columns, rows, sortable=False)


def _origin(run: Run) -> dict[str, str]:
    result = run.evaluation or run.bench or {}
    settings, origin = result.get("settings") or {}, result.get("provenance")
    found = {name.replace("_", " "): str(settings[name]) for name in _DIFFERENT if name in settings}
    if origin:
        found |= {name: str(origin[name]) for name in ("device", "created", "revision", "command")}
        found |= {"versions": ", ".join(f"{name} {version}" for name, version in origin["versions"].items())}
    return found


def mean(values: Sequence[float]) -> float | None:
    """A mean; None of nothing."""
    return statistics.fmean(values) if values else None
