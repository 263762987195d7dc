"""The numbers of the page's charts, as tables: medians and pooled ratios with intervals over clips."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alpamayo_dflash.common.bootstrap import Interval, median_interval, ratio_interval
from alpamayo_dflash.common.fields import is_number
from alpamayo_dflash.report.page.data import Column, DataTable, Value, clip_link, of_objects
from alpamayo_dflash.report.page.runs import Run, Series
from alpamayo_dflash.report.page.sections import manoeuvre_in, over
from alpamayo_dflash.report.page.tallies import (
    block_places,
    recorded,
    sentence_places,
    sources,
    tokens_a_round,
)
from alpamayo_dflash.report.tables import ARM_NAMES, WINDOW_PARTS

TARGET = "target"
_BOOTSTRAP = "Intervals: 95 %, bootstrap over clips."
_SERIES = Column("series", "run")
_Objects = list[dict[str, Value]]


def _interval_columns(digits: int) -> tuple[Column, Column]:
    return Column("low", "95 % from", "number", digits), Column("high", "to", "number", digits)


def _share_columns() -> tuple[Column, Column]:
    return Column("low", "95 % from", "share"), Column("high", "to", "share")


def _ends(interval: Interval | None) -> dict[str, Value]:
    return {"low": None, "high": None} if interval is None else {"low": interval[0], "high": interval[1]}


def _numbers(values: Iterable[Any]) -> list[float]:
    return [float(value) for value in values if is_number(value)]


def _arms(series: Series) -> list[str]:
    """Its arms, in the order in which they are shown."""
    there = series.rows[0]["arms"] if series.rows else series.result["arms"]
    return [arm for arm in ("dflash", "autoregressive", "transformers") if arm in there]


def times(series: Sequence[Series]) -> DataTable:
    """Median ms of each part of a clip's time, by arm."""
    split = any(each.rows for each in series) and all(
        is_number(row["arms"][arm].get(f"{part}_ms"))
        for each in series
        for arm in _arms(each)
        for row in each.rows
        for part in WINDOW_PARTS[:3]
    )
    parts = WINDOW_PARTS if split else ("prefill", "decode", "action")
    objects: _Objects = []
    for each in series:
        for arm in _arms(each):
            for part in parts:
                found = _numbers(row["arms"][arm].get(f"{part}_ms") for row in each.rows)
                kept = each.result["arms"].get(arm, {}).get(f"{part}_ms")  # of results without rows
                ms = statistics.median(found) if found else kept
                if ms is not None:
                    ends = _ends(median_interval(found))
                    objects.append(
                        {"series": each.name, "arm": ARM_NAMES[arm], "part": part, "ms": ms, **ends}
                    )
    columns = (_SERIES, Column("arm", "arm"), Column("part", "part"), Column("ms", "ms", "number", 1))
    note = f"Medians over clips of each part, so that their sum is not the median of the whole. {_BOOTSTRAP}"
    return of_objects("Time of a clip by part", (*columns, *_interval_columns(1)), objects, note)


def decode_parts(series: Sequence[Series]) -> DataTable:
    """Mean ms of each part of decode."""
    objects: _Objects = []
    for each in series:
        rows = [row["parts_ms"] for row in each.rows if row.get("parts_ms")]
        names = dict.fromkeys(name for row in rows for name in row)
        whole = sum(sum(_numbers(row.values())) for row in rows)
        for name in names:
            found = [float(row.get(name, 0.0)) for row in rows]
            if sum(found) > 0:
                mean = {"ms": statistics.fmean(found), "share": over(sum(found), whole)}
                interval = _ends(ratio_interval(found, [1.0] * len(found)))
                objects.append({"series": each.name, "part": name, **mean, **interval})
        if not each.rows:
            kept = each.result.get("decode_parts") or {}
            objects += [{"series": each.name, "part": name, **part} for name, part in kept.items()]
    columns = (
        _SERIES,
        Column("part", "part"),
        Column("ms", "ms a clip", "number", 2),
        Column("share", "share", "share"),
    )
    note = f"Means over clips, of a decode of its own beside the timed one. {_BOOTSTRAP}"
    return of_objects("Where decode's time goes", (*columns, *_interval_columns(2)), objects, note)


def decode_by_tokens(runs: Sequence[Run]) -> DataTable:
    """Each clip's decode time with its tokens, by arm."""
    objects: _Objects = []
    links: list[str] = []
    for number, run in enumerate(runs):
        for each in run.series[:1]:
            for arm in _arms(each):
                for row in each.rows:
                    found = row["arms"][arm]
                    objects.append(
                        {
                            "clip": row["clip_id"],
                            "series": each.name,
                            "arm": ARM_NAMES[arm],
                            "tokens": found["tokens"],
                            "ms": found["decode_ms"],
                        }
                    )
                    links.append(clip_link(number, row["clip_id"]))
    columns = (
        Column("clip", "clip"),
        _SERIES,
        Column("arm", "arm"),
        Column("tokens", "tokens", "count"),
        Column("ms", "decode, ms", "number", 1),
    )
    return of_objects("Tokens against decode time", columns, objects, "One mark a clip and arm.", links)


def speedups(runs: Sequence[Run]) -> DataTable:
    """How many times faster DFlash's decode was on each clip."""
    objects: _Objects = []
    links: list[str] = []
    for number, run in enumerate(runs):
        for each in run.series[:1]:
            for arm in _arms(each)[1:]:
                for row in each.rows:
                    ratio = over(row["arms"][arm]["decode_ms"], row["arms"]["dflash"]["decode_ms"])
                    if ratio is not None:
                        against = f"against {ARM_NAMES[arm]}"
                        objects.append(
                            {"clip": row["clip_id"], "series": each.name, "against": against, "times": ratio}
                        )
                        links.append(clip_link(number, row["clip_id"]))
    columns = (
        Column("clip", "clip"),
        _SERIES,
        Column("against", "against"),
        Column("times", "times faster", "number", 2),
    )
    note = "A tick is a clip, the mark the median; at 1 both take equally long."
    return of_objects("Decode speed-up of each clip", columns, objects, note, links)


def round_lengths(series: Sequence[Series]) -> DataTable:
    """How many tokens the rounds gave."""
    objects: _Objects = []
    for each in series:
        counts = tokens_a_round(each.rows)
        whole = sum(counts.values())
        for tokens in sorted(counts):
            share = over(counts[tokens], whole)
            objects.append({"series": each.name, "tokens": tokens, "rounds": counts[tokens], "share": share})
    columns = (
        _SERIES,
        Column("tokens", "tokens of a round", "count"),
        Column("rounds", "rounds", "count"),
        Column("share", "share", "share"),
    )
    note = "Each round's accepted tokens and the target's own one after them."
    return of_objects("Tokens a round", columns, objects, note)


def clip_lengths(runs: Sequence[Run]) -> DataTable:
    """Each clip's own acceptance length."""
    objects: _Objects = []
    links: list[str] = []
    for number, run in enumerate(runs):
        for each in run.series[:1]:
            for row in each.rows:
                found = row["acceptance"]
                length = over(found["tokens_after_first"], found["passes"])
                if length is not None:
                    objects.append(
                        {
                            "clip": row["clip_id"],
                            "series": each.name,
                            "tokens": found["tokens_after_first"],
                            "passes": found["passes"],
                            "length": length,
                        }
                    )
                    links.append(clip_link(number, row["clip_id"]))
    columns = (
        Column("clip", "clip"),
        _SERIES,
        Column("tokens", "tokens after the first", "count"),
        Column("passes", "passes", "count"),
        Column("length", "tokens a pass", "number", 2),
    )
    return of_objects("Acceptance length of each clip", columns, objects, links=links)


def by_block_place(series: Sequence[Series]) -> DataTable:
    """How often the token proposed at each place in the block was taken."""
    objects: _Objects = []
    for each in series:
        clips = [block_places(row) for row in recorded(each.rows)]
        for place in sorted({place for clip in clips for place in clip.proposed}):
            proposed = [float(clip.proposed[place]) for clip in clips]
            taken = [float(clip.taken[place]) for clip in clips]
            reached = sum(clip.reached[place] for clip in clips)
            objects.append(
                {
                    "series": each.name,
                    "place": place,
                    "proposed": int(sum(proposed)),
                    "taken": int(sum(taken)),
                    "share": over(sum(taken), sum(proposed)),
                    **_ends(ratio_interval(taken, proposed)),
                    "reached": reached,
                    "of_reached": over(sum(taken), reached),
                }
            )
    columns = (
        _SERIES,
        Column("place", "place in the block", "count"),
        Column("proposed", "proposed", "count"),
        Column("taken", "accepted", "count"),
        Column("share", "accepted of proposed", "share"),
        *_share_columns(),
        Column("reached", "reached", "count"),
        Column("of_reached", "accepted of reached", "share"),
    )
    note = (
        "Line: accepted of all proposed there. Dashed: of those where all before were accepted. "
        f"Place 1 is right behind the round's first token. {_BOOTSTRAP}"
    )
    return of_objects("Acceptance by place in the block", columns, objects, note)


def by_sentence_place(series: Sequence[Series]) -> DataTable:
    """How many of the tokens at each place in the sentence were accepted proposals."""
    objects: _Objects = []
    for each in series:
        clips = [sentence_places(row) for row in recorded(each.rows)]
        for place in sorted({place for clip in clips for place in clip}):
            counts = [clip.get(place, Counter()) for clip in clips]
            tokens = [float(sum(count.values())) for count in counts]
            given = [some - count[TARGET] for some, count in zip(tokens, counts, strict=True)]
            objects.append(
                {
                    "series": each.name,
                    "place": place,
                    "tokens": int(sum(tokens)),
                    "given": int(sum(given)),
                    "share": over(sum(given), sum(tokens)),
                    **_ends(ratio_interval(given, tokens)),
                }
            )
    columns = (
        _SERIES,
        Column("place", "place in the sentence", "count"),
        Column("tokens", "tokens", "count"),
        Column("given", "accepted proposals", "count"),
        Column("share", "share", "share"),
        *_share_columns(),
    )
    note = (
        "Of the tokens at each place those that had been proposed; the others are the target's own, "
        "among them the one that follows a round taken whole. "
        f"Larger marks stand for more tokens. {_BOOTSTRAP}"
    )
    return of_objects("Acceptance by place in the sentence", columns, objects, note)


def by_manoeuvre(series: Sequence[Series]) -> DataTable:
    """The pooled acceptance length of the clips of each manoeuvre."""
    objects: _Objects = []
    for each in series:
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in each.rows:
            groups.setdefault(manoeuvre_in(row), []).append(row["acceptance"])
        for name, found in sorted(groups.items()):
            tokens = [float(count["tokens_after_first"]) for count in found]
            passes = [float(count["passes"]) for count in found]
            length = over(sum(tokens), sum(passes))
            ends = _ends(ratio_interval(tokens, passes))
            counted: dict[str, Value] = {"clips": len(found), "passes": int(sum(passes))}
            objects.append({"series": each.name, "manoeuvre": name, **counted, "length": length, **ends})
    columns = (
        _SERIES,
        Column("manoeuvre", "manoeuvre"),
        Column("clips", "clips", "count"),
        Column("passes", "passes", "count"),
        Column("length", "tokens a pass", "number", 2),
        *_interval_columns(2),
    )
    note = f"The manoeuvre is what the clip's first CoC says to do. {_BOOTSTRAP}"
    return of_objects("Acceptance by manoeuvre", columns, objects, note)


def by_source(series: Sequence[Series]) -> DataTable:
    """Who gave the tokens after the first."""
    objects: _Objects = []
    for each in series:
        counts = sources(each.rows) or Counter(each.result.get("sources") or {})
        whole = sum(counts.values())
        for name, count in counts.most_common():
            objects.append(
                {"series": each.name, "source": name, "tokens": count, "share": over(count, whole)}
            )
    columns = (
        _SERIES,
        Column("source", "source"),
        Column("tokens", "tokens", "count"),
        Column("share", "share", "share"),
    )
    note = "Of the tokens after the first. The target's own is what it says where a round's proposals end."
    return of_objects("Where tokens come from", columns, objects, note)


def source_by_place(each: Series) -> DataTable:
    """Who gave the tokens at each place of the sentence."""
    found: dict[int, Counter[str]] = {}
    for row in recorded(each.rows):
        for place, counts in sentence_places(row).items():
            found.setdefault(place, Counter()).update(counts)
    objects: _Objects = [
        {"place": place, "source": name, "tokens": count}
        for place, counts in sorted(found.items())
        for name, count in sorted(counts.items())
    ]
    columns = (
        Column("place", "place in the sentence", "count"),
        Column("source", "source"),
        Column("tokens", "tokens", "count"),
    )
    return of_objects(f"Sources by place in the sentence: {each.name}", columns, objects)


def errors(runs: Sequence[Run]) -> DataTable:
    """Each clip's trajectory error, and the constant velocity's."""
    objects: _Objects = []
    links: list[str] = []
    for number, run in enumerate(runs):
        for row in (row for each in run.series[:1] for row in each.rows if row.get("trajectory")):
            found = row["trajectory"]
            objects.append(
                {
                    "clip": row["clip_id"],
                    "series": run.name,
                    "error": found["min_ade_m"],
                    "constant": found["constant_velocity_ade_m"],
                }
            )
            links.append(clip_link(number, row["clip_id"]))
    columns = (
        Column("clip", "clip"),
        _SERIES,
        Column("error", "minADE, m", "number", 2),
        Column("constant", "constant velocity's ADE, m", "number", 2),
    )
    note = "Below the line the trajectory is nearer to what the vehicle did than a constant velocity is."
    return of_objects("Errors of the trajectories", columns, objects, note, links)


_NO_LOSSES = frozenset(("step", "gradient_norm", "learning_rate", "labels_outside_vocab"))
_LENGTHS = {
    "acceptance_length": "simulated",
    "expected_acceptance_length": "expected, sampled",
    "real_acceptance_length": "real, sampled",
    "real_greedy_acceptance_length": "real, greedy",
}


def losses(runs: Sequence[Run]) -> DataTable:
    """The training losses."""
    objects: _Objects = []
    for run in runs:
        for entry in (run.training or {}).get("losses") or []:
            for name, value in entry.items():
                if name not in _NO_LOSSES and is_number(value) and is_number(entry.get("step")):
                    objects.append({"series": run.name, "step": entry["step"], "loss": name, "value": value})
    columns = (
        _SERIES,
        Column("step", "step", "count"),
        Column("loss", "loss"),
        Column("value", "value, nats", "number", 4),
    )
    return of_objects("Losses over training", columns, objects)


def training_acceptance(runs: Sequence[Run]) -> DataTable:
    """The acceptance lengths over training: simulated, expected and real."""
    objects: _Objects = []
    for run in runs:
        training = run.training or {}
        for entry in training.get("evaluations", []):
            for key, kind in _LENGTHS.items():
                if is_number(entry.get(key)):
                    best = entry["step"] == training.get("best_step")
                    objects.append(
                        {
                            "series": run.name,
                            "step": entry["step"],
                            "kind": kind,
                            "length": entry[key],
                            "best": best,
                        }
                    )
    columns = (
        _SERIES,
        Column("step", "step", "count"),
        Column("kind", "kind"),
        Column("length", "tokens a pass", "number", 2),
        Column("best", "the draft that was kept"),
    )
    note = "On clips held out of training. Filled: the draft that was kept."
    return of_objects("Acceptance length over training", columns, objects, note)


def layer_cosines(runs: Sequence[Run]) -> DataTable:
    """Step A: each layer's cosine to the last."""
    objects = [
        {"series": run.name, "layer": layer, "value": value, "chosen": layer in run.layers["target_layers"]}
        for run in runs
        if run.layers is not None
        for layer, value in enumerate(run.layers["cosine"])
    ]
    return _layers(
        "Layers, step A: cosine to the last layer", Column("value", "cosine", "number", 4), objects
    )


def layer_losses(runs: Sequence[Run]) -> DataTable:
    """Step B: each layer's early-exit cross-entropy."""
    objects = [
        {
            "series": run.name,
            "layer": int(layer),
            "value": value,
            "chosen": int(layer) in run.layers["target_layers"],
        }
        for run in runs
        if run.layers is not None
        for layer, value in sorted(run.layers["early_exit_ce"].items(), key=lambda item: int(item[0]))
    ]
    column = Column("value", "cross-entropy, nats", "number", 4)
    return _layers("Layers, step B: early-exit cross-entropy", column, objects)


def _layers(title: str, value: Column, objects: Sequence[dict[str, Value]]) -> DataTable:
    columns = (_SERIES, Column("layer", "target layer", "count"), value, Column("chosen", "tapped"))
    return of_objects(title, columns, objects, "Filled, with a line: the layers that the draft taps.")


WINDOW_ARMS = {
    "ours_1": "this project",
    "autoregressive_1": "this project, one token a pass",
    "compiled_1": "transformers, compiled",
    "transformers_1": "transformers, eager",
    "floor": "floor",
}


def window_parts(name: str, bench: Mapping[str, Any]) -> DataTable:
    """A window's parts by arm, beside the floor."""
    parts = bench["parts"]
    objects: _Objects = []
    for arm, label in WINDOW_ARMS.items():
        for part in (*WINDOW_PARTS, "whole"):
            ms = parts.get(arm, {}).get(part)
            if ms is not None:
                least = parts.get("floor", {}).get(part) if arm != "floor" else None
                objects.append(
                    {"arm": label, "part": part, "ms": ms, "floor": least, "over": over(ms, least)}
                )
    columns = (
        Column("arm", "arm"),
        Column("part", "part"),
        Column("ms", "ms", "number", 2),
        Column("floor", "floor, ms", "number", 2),
        Column("over", "over floor", "number", 2),
    )
    here = (bench.get("gpu") or {}).get("name") or "CPU"
    title = f"A window, camera to trajectory, on {here}: {name}"
    return of_objects(title, columns, objects, "Medians, one sample; the floor is what the hardware needs.")


def over_floors(name: str, bench: Mapping[str, Any]) -> DataTable | None:
    """Times over their floors; None where they were not taken."""
    rows = (bench.get("floors") or {}).get("rows")
    if not rows:
        return None
    columns = (
        Column("what", "what"),
        Column("arm", "arm"),
        Column("measured_ms", "ms", "number", 2),
        Column("floor_ms", "floor, ms", "number", 2),
        Column("bound", "bound by"),
        Column("over_floor", "over floor", "number", 2),
    )
    return of_objects(f"Times over their floors: {name}", columns, rows)
