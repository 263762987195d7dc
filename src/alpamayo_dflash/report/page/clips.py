"""A clip's row and trace as the JSON that the browser shows: what can be computed is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from alpamayo_dflash.common.fields import file_name
from alpamayo_dflash.report.clip_trace import FILE, ClipTrace, read_clip_trace
from alpamayo_dflash.report.page.clip_charts import clip_specs
from alpamayo_dflash.report.page.islands import visible
from alpamayo_dflash.report.page.palette import OTHER_LOOK, SOURCE_LOOKS
from alpamayo_dflash.report.page.pictures import Pictures
from alpamayo_dflash.report.page.rounds import (
    Alternative,
    RoundView,
    alternatives,
    first_node,
    round_views,
)
from alpamayo_dflash.report.page.runs import Run
from alpamayo_dflash.report.tables import ARM_NAMES

_LEAST_SPAN_M = 12.0  # a straight drive gets room at its sides
_MARGIN = 0.04


class SampleView(TypedDict):
    """One text: as a whole, and where it was traced its first token with alternatives, and its rounds."""

    coc: str
    first: NotRequired[dict[str, Any]]
    first_target: NotRequired[list[Alternative]]
    rounds: NotRequired[list[RoundView]]


class BarView(TypedDict):
    """A part of the clip's time; `round` counts from 0, None where it is of none or not known which."""

    name: str
    start_ms: float
    end_ms: float
    round: int | None


class FrameView(TypedDict):
    """A picture; `time_s` is 0 for the newest, and `picture` its name in the page's pictures."""

    camera: str
    time_s: float
    picture: str


class PathView(TypedDict):
    """A path from above: t s, x m forward, y m left, by point."""

    name: str
    points: list[tuple[float, float, float]]


class ClipView(TypedDict):
    """All that the browser shows of a clip; every text in it is `visible`, but `clip`, its id as it is."""

    clip: str
    name: str
    notes: list[str]
    facts: list[tuple[str, str]]
    temperature: NotRequired[float]
    top_p: NotRequired[float]
    samples: list[SampleView]
    bars: list[BarView]
    frames: list[FrameView]
    paths: list[PathView]
    extent: NotRequired[dict[str, tuple[float, float]]]


def clips_context(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """What `clips.html.j2` is made of; frames that the page does not hold are written beside it.

    Args:
        runs: of the page, in its order.
        out: the page's file.

    Returns:
        `clips_index`, for each run its clips with the numbers of their view and pictures; `clips_views`;
        `clips_pictures`, of each clip the sources of its pictures by name; `clips_charts`, the
        specifications; `clips_letters` and `clips_looks` of the sources of tokens.
    """
    views: list[ClipView] = []
    index: list[dict[str, Any]] = []
    pictures = Pictures()
    for run in runs:
        entries = []
        for clip, view in _views(run, pictures):
            entries.append({"clip": clip, "view": len(views), "pictures": pictures.number(clip)})
            views.append(view)
        index.append({"name": visible(run.name), "clips": entries})
    return {
        "clips_index": index,
        "clips_views": views,
        "clips_pictures": pictures.close(chosen_clips(runs), out),
        "clips_charts": clip_specs(),
        "clips_letters": {name: look.letter for name, look in SOURCE_LOOKS.items()},
        "clips_looks": [*SOURCE_LOOKS.items(), ("another proposer", OTHER_LOOK)],
    }


def _views(run: Run, pictures: Pictures) -> Iterator[tuple[str, ClipView]]:
    """Each clip's view, those of clips that failed at the end."""
    for row in run.rows:
        yield row["clip_id"], _view_of(run.traces, row, pictures)
    failures = () if run.evaluation is None else run.evaluation["clips"]["failures"]
    for failure in failures:
        view = _bare_view(failure["clip_id"])
        view["notes"].append(f"This clip failed: {visible(failure['error'])}")
        yield failure["clip_id"], view


def _view_of(traces: Path | None, row: Mapping[str, Any], pictures: Pictures) -> ClipView:
    """A row's view; a trace that cannot be shown is named in its notes."""
    try:
        folder = None if traces is None else traces / file_name(row["clip_id"], "clip_id")
        if folder is not None and (folder / FILE).is_file():
            trace = read_clip_trace(folder)
            view = clip_view(row, trace)
            _add_frames(view, folder, trace, pictures)
            return view
        note = "No trace of this clip was kept: `evaluate --trace` keeps frames, rounds and paths."
    except ValueError as error:
        note = f"The trace of this clip cannot be shown: {visible(str(error))}"
    view = row_view(row)
    view["notes"].append(note)
    return view


def _add_frames(view: ClipView, folder: Path, trace: ClipTrace, pictures: Pictures) -> None:
    """The frames in the trace's order; one that is missing or damaged is named in the notes."""
    newest = max((each["index"] for each in trace["frames"]), default=0)
    for frame in trace["frames"]:
        try:
            picture = pictures.add(trace["clip_id"], folder, frame)
        except ValueError as error:
            view["notes"].append(visible(str(error)))
            continue
        time_s = round((frame["index"] - newest) * trace["step_s"], 3)
        view["frames"].append({"camera": camera_name(frame["camera"]), "time_s": time_s, "picture": picture})


def _bare_view(clip_id: str) -> ClipView:
    return {
        "clip": clip_id,
        "name": visible(clip_id),
        "notes": [],
        "facts": [],
        "samples": [],
        "bars": [],
        "frames": [],
        "paths": [],
    }


def row_view(row: Mapping[str, Any]) -> ClipView:
    """What a row alone shows: texts, facts and the times of the speculative loop."""
    view = _bare_view(row["clip_id"])
    view["facts"] = _facts(row)
    view["notes"] = _differences(row)
    view["samples"] = [{"coc": visible(text)} for text in row["coc"]]
    view["bars"] = list(_row_bars(row["arms"]["dflash"]))
    return view


def clip_view(row: Mapping[str, Any], trace: ClipTrace) -> ClipView:
    """What a row and its trace show; the frames are left to the caller.

    Raises:
        ValueError: the trace is another clip's, or of another text.
    """
    if trace["clip_id"] != row["clip_id"]:
        raise ValueError(f"it is of clip {trace['clip_id']!r:.80}, not of {row['clip_id']!r:.80}")
    if trace["equal"] and trace["coc"] != list(row["coc"]):
        raise ValueError("its texts are not the row's, though it says so: it is of another evaluation")
    view = row_view(row)
    if not trace["equal"]:
        view["notes"].append("The traced decode wrote other texts than the evaluation; they are shown here.")
        view["samples"] = [{"coc": visible(text)} for text in trace["coc"]]
    view["temperature"], view["top_p"] = trace["temperature"], trace["top_p"]
    for sample, each in enumerate(view["samples"]):
        each["first"] = first_node(trace, sample)
        each["first_target"] = alternatives(trace, trace["first"])[sample]
        each["rounds"] = list(round_views(trace, sample))
    view["bars"] = _bars(trace)
    view["paths"] = _paths(trace)
    view["extent"] = _extent(view["paths"])
    return view


def _differences(row: Mapping[str, Any]) -> list[str]:
    """What was not equal, or failed, in words."""
    identity = row.get("identity") or {}
    names = {
        "greedy": "The greedy text is not that of decoding token by token.",
        "sampled": "The sampled texts are not those of decoding token by token.",
        "autoregressive_equals_transformers": "Decoding token by token is not equal to transformers.",
    }
    found = [text for name, text in names.items() if identity.get(name) is False]
    if identity.get("near_ties"):
        found.append(f"{identity['near_ties']} texts part at a near-tie, where bfloat16 may.")
    failures = row["acceptance"].get("draft_failures")
    if failures:
        found.append(f"The draft failed {failures} times; the target went on alone.")
    return found


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the clip's figures."""
    counts, arms = row["acceptance"], row["arms"]
    facts: list[tuple[str, str]] = []
    if counts["passes"]:
        length = counts["tokens_after_first"] / counts["passes"]
        facts.append(("Acceptance length", f"{length:.2f} tokens a pass"))
    facts.append(("Tokens and passes", f"{counts['tokens_after_first']} in {counts['passes']}"))
    if counts.get("drafted"):
        facts.append(("Drafted tokens accepted", f"{counts['accepted']} of {counts['drafted']}"))
    facts += [(f"Decode, {arm}", f"{arms[arm]['decode_ms']:.1f} ms") for arm in ARM_NAMES if arm in arms]
    if "total_ms" in arms["dflash"]:
        facts.append(("Whole window, dflash", f"{arms['dflash']['total_ms']:.1f} ms"))
    errors = row.get("trajectory")
    if errors:
        facts.append(("minADE of the path", f"{errors['min_ade_m']:.2f} m"))
        facts.append(("ADE at constant velocity", f"{errors['constant_velocity_ade_m']:.2f} m"))
    named = row.get("named")
    if named:
        words = [f"{name} {'named' if named[name] else 'not named'}" for name in ("manoeuvre", "cause")]
        facts.append(("Text", ", ".join(words)))
    if "prompt_tokens" in row:
        facts.append(("Prompt", f"{row['prompt_tokens']} tokens"))
    return facts


def _row_bars(times: Mapping[str, Any]) -> Iterator[BarView]:
    """Prompt, decode and trajectory one after another."""
    start = 0.0
    for name in ("prefill", "decode", "action"):
        if f"{name}_ms" in times:
            end = start + times[f"{name}_ms"]
            yield {"name": name, "start_ms": round(start, 3), "end_ms": round(end, 3), "round": None}
            start = end


def _bars(trace: ClipTrace) -> list[BarView]:
    """The trace's bars with the rounds that they are of."""
    found = trace["bars"]
    rounds = 1 + max((each["index"] for sample in trace["rounds"] for each in sample), default=-1)
    begins = [name for name in ("round", "draft") if _count(trace, name) == rounds]
    current, views = -1, list[BarView]()
    for bar in found:
        if begins and bar["name"] == begins[0]:
            current += 1
        inside = current >= 0 and bar["name"] not in ("prefill", "action")
        views.append({**bar, "name": visible(bar["name"]), "round": current if inside else None})
    return views


def _count(trace: ClipTrace, name: str) -> int:
    return sum(bar["name"] == name for bar in trace["bars"])


def _paths(trace: ClipTrace) -> list[PathView]:
    step = trace["step_s"]

    def path(name: str, points: Sequence[tuple[float, float]], first: int) -> PathView:
        timed = [(round((first + i) * step, 3), x, y) for i, (x, y) in enumerate(points)]
        return {"name": name, "points": timed}

    history = trace["history_xy"]
    paths = [path("history", history, 1 - len(history))]
    if trace["future_xy"] is not None:
        paths.append(path("what the vehicle did", trace["future_xy"], 1))
    paths += [path(f"sample {s}", points, 1) for s, points in enumerate(trace["predicted_xy"])]
    return paths


def _extent(paths: Sequence[PathView]) -> dict[str, tuple[float, float]]:
    """The ranges of x and y that a picture of all paths shows."""
    found = {}
    for axis, name in ((1, "x"), (2, "y")):
        values = [point[axis] for path in paths for point in path["points"]] or [0.0]
        low, high = min(values), max(values)
        half = max((high - low) * (0.5 + _MARGIN), _LEAST_SPAN_M / 2)
        found[name] = (round((low + high) / 2 - half, 2), round((low + high) / 2 + half, 2))
    return found


def camera_name(name: str) -> str:
    """A camera's name as a caption: "front wide 120°" of "camera_front_wide_120fov"."""
    words = name.removeprefix("camera_").split("_")
    return visible(" ".join(f"{word[:-3]}°" if _is_angle(word) else word for word in words))


def _is_angle(word: str) -> bool:
    return word.endswith("fov") and word[:-3].isdecimal()


def chosen_clips(runs: Sequence[Run]) -> list[str]:
    """All clips, those first whose frames are most looked for.

    Not equal, then with a draft that failed, then in turns the slowest and those of the greatest error.
    """
    rows = [row for run in runs for row in run.rows]
    slowest = sorted(rows, key=lambda row: -float(row["arms"]["dflash"]["decode_ms"]))
    worst = sorted(rows, key=lambda row: -float((row.get("trajectory") or {}).get("min_ade_m", 0)))
    unequal = [row for row in rows if _unequal(row)]
    failed = [row for row in rows if row["acceptance"].get("draft_failures")]
    turns = (row for pair in zip(slowest, worst, strict=True) for row in pair)
    return list(dict.fromkeys(row["clip_id"] for row in (*unequal, *failed, *turns)))


def _unequal(row: Mapping[str, Any]) -> bool:
    identity = row.get("identity") or {}
    parts = (identity.get(name) for name in ("greedy", "sampled", "autoregressive_equals_transformers"))
    return False in parts or (row.get("trace") or {}).get("equal") is False
