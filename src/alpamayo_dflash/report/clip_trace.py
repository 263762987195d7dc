"""The shape of a clip's trace, which `evaluate --trace` writes: what a page of the clip shows.

A trace is a folder: `clip.json` and the frames as small JPEG files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import checked, file_name, naming
from alpamayo_dflash.common.options import check_range

FILE = "clip.json"
_MOST = 1e9
"""Beyond any logit, time in ms and place in metres that a trace holds."""


class Places(TypedDict):
    """What target or draft thought of the tokens at places in a row; see `decode.observer.PlaceScores`.

    Every list has one entry a place, which takes less of the file than an object a place would.
    """

    ids: list[list[int]]
    logits: list[list[float]]
    log_sum_exp: list[float]
    tempered_log_sum_exp: list[float]
    nucleus_mass: list[float]
    nucleus_logit: list[float]
    chosen: list[int | None]
    chosen_logit: list[float | None]
    chosen_rank: list[int | None]


class RoundRow(TypedDict):
    """What one round of the speculative loop did for one sample, as `decode.observer.SampleTrace` says it."""

    position: int
    anchor: int
    proposed: list[int]
    parents: list[int]
    sources: list[str]
    taken: list[int]
    emitted: list[int]
    origins: list[str]


class Round(RoundRow):
    """The same with what target and draft thought; see `decode.observer.SampleScores`.

    `index` is the round's number: several samples share one.
    """

    index: int
    target: Places
    at: list[int]
    draft: Places


class Bar(TypedDict):
    """A part of the clip's time: "prefill", one of `decode.observer.SPANS`, or "action"."""

    name: str
    start_ms: float
    end_ms: float


class Frame(TypedDict):
    """A picture in the trace's folder: its camera, its place in time (0 is the oldest), and its file."""

    camera: str
    index: int
    file: str
    sha256: str


class ClipTrace(TypedDict):
    """All that the page of a clip shows.

    Attributes:
        evaluation: the mark of the evaluation that it belongs to.
        clip_id: the clip.
        t0_us: the moment, microseconds.
        temperature: of the decode; 0 is greedy.
        top_p: its nucleus.
        block_size: the draft's.
        equal: whether the traced decode wrote the texts of the evaluation's row.
        coc: the texts, by sample.
        pieces: each token's text, by its id.
        first_tokens: by sample.
        first: what the target thought of them in the prompt's own pass, a place a sample.
        rounds: by sample, in order.
        bars: from the reading of the prompt on. Those of a round are of a decode of their own, that nobody
            scored; the others are of the evaluation's row.
        frames: the window's.
        step_s: between two points.
        history_xy: [16, 2] metres in the ego frame at t0, x forward, y left; the last point is the origin.
        future_xy: [N, 2], what the vehicle did, or null.
        predicted_xy: [samples, N, 2].
    """

    evaluation: str
    clip_id: str
    t0_us: int
    temperature: float
    top_p: float
    block_size: int
    equal: bool
    coc: list[str]
    pieces: dict[str, str]
    first_tokens: list[int]
    first: Places
    rounds: list[list[Round]]
    bars: list[Bar]
    frames: list[Frame]
    step_s: float
    history_xy: list[tuple[float, float]]
    future_xy: list[tuple[float, float]] | None
    predicted_xy: list[list[tuple[float, float]]]


def read_clip_trace(folder: Path) -> ClipTrace:
    """Read a clip's trace.

    Raises:
        ValueError: it is missing, is none, or contradicts itself; the message names file and key.
    """
    path = folder / FILE
    found = read_json(path)
    with naming(str(path)):
        _check(checked(found, ClipTrace, "trace"))
    return cast(ClipTrace, found)


def frame_bytes(folder: Path, frame: Frame) -> bytes:
    """A frame's JPEG file, held to its checksum.

    Raises:
        ValueError: it is missing, or not what was written.
    """
    path = folder / frame["file"]
    try:
        found = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); it is a frame of {FILE}") from None
    if hashlib.sha256(found).hexdigest() != frame["sha256"]:
        raise ValueError(f"{path}: changed since it was written, its sha256 in {FILE} is another")
    return found


def probability(places: Places, index: int, logit: float, temperature: float) -> float:
    """How probable a token was at a place, in what the decode draws from (at temperature 1 if greedy).

    Args:
        places: of the target, or of the draft.
        index: the place.
        logit: the token's there.
        temperature: the decode's.
    """
    if logit < places["nucleus_logit"][index]:
        return 0.0
    tempered = logit / (temperature or 1.0) - places["tempered_log_sum_exp"][index]
    return min(1.0, math.exp(min(0.0, tempered)) / places["nucleus_mass"][index])


def _check(trace: dict[str, Any]) -> None:
    """What the kinds of the values do not say: counts, indices and sizes."""
    samples = len(trace["coc"])
    for name in ("first_tokens", "rounds", "predicted_xy"):
        _same(len(trace[name]), samples, f"{name} has {{}} samples; coc has {{}}")
    check_range(0, _MOST, temperature=trace["temperature"], top_p=trace["top_p"], step_s=trace["step_s"])
    _same(_check_places(trace["first"], "first"), samples, "first has {} places; coc has {} samples")
    _check_pieces(trace, [trace["first_tokens"], *trace["first"]["ids"]], "first")
    for each in (round_ for sample in trace["rounds"] for round_ in sample):
        _check_round(each)
        tokens = [[each["anchor"]], each["proposed"], each["emitted"]]
        _check_pieces(trace, [*tokens, *each["target"]["ids"], *each["draft"]["ids"]], "rounds")
    for bar in trace["bars"]:
        check_range(0, _MOST, start_ms=bar["start_ms"], end_ms=bar["end_ms"])
    for frame in trace["frames"]:
        file_name(frame["file"], "frames.file")
        check_range(0, _MOST, **{"frames.index": frame["index"]})
    paths = (trace["history_xy"], trace["future_xy"] or [], *trace["predicted_xy"])
    for point in (point for path in paths for point in path):
        check_range(-_MOST, _MOST, x=point[0], y=point[1])


def check_round_row(each: Mapping[str, Any]) -> None:
    """A round's counts and indices agree with each other.

    Raises:
        ValueError: they do not; the message names the key.
    """
    proposed, emitted = len(each["proposed"]), len(each["emitted"])
    for name in ("parents", "sources"):
        _same(len(each[name]), proposed, f"rounds: {name} has {{}} tokens; proposed has {{}}")
    _same(len(each["origins"]), emitted, "rounds: origins has {} tokens; emitted has {}")
    for node, parent in enumerate(each["parents"]):
        check_range(-1, node - 1, **{"rounds: parents": parent})
    for index in each["taken"]:
        check_range(0, proposed - 1, **{"rounds: taken": index})


def _check_round(each: dict[str, Any]) -> None:
    check_round_row(each)
    proposed, emitted = len(each["proposed"]), len(each["emitted"])
    _same(len(each["at"]), emitted, "rounds: at has {} tokens; emitted has {}")
    places = _check_places(each["target"], "rounds: target")
    _check_places(each["draft"], "rounds: draft")
    if places <= proposed:
        raise ValueError(
            f"rounds: target has {places} places; it must have one after the anchor and after each of "
            f"{proposed} proposed tokens"
        )
    for index in each["at"]:
        check_range(0, places - 1, **{"rounds: at": index})


def _check_places(places: dict[str, Any], where: str) -> int:
    """How many places there are."""
    count = len(places["ids"])
    for name in Places.__annotations__:
        _same(len(places[name]), count, f"{where}.{name} has {{}} places; ids has {{}}")
    for ids, logits in zip(places["ids"], places["logits"], strict=True):
        _same(len(ids), len(logits), f"{where}: ids has {{}} tokens at a place; logits has {{}}")
    numbers = [places[name] for name in ("log_sum_exp", "tempered_log_sum_exp", "nucleus_logit")]
    for each in (*numbers, *places["logits"], [number or 0.0 for number in places["chosen_logit"]]):
        for number in each:
            check_range(-_MOST, _MOST, **{where: number})
    for mass in places["nucleus_mass"]:
        if not 0 < mass <= 1 + 1e-3:  # a float32 sum
            raise ValueError(f"{where}.nucleus_mass is {mass}; it must be above 0 and at most 1")
    return count


def _check_pieces(trace: dict[str, Any], tokens: Iterable[Sequence[int]], where: str) -> None:
    unknown = [token for some in tokens for token in some if str(token) not in trace["pieces"]]
    if unknown:
        raise ValueError(f"{where}: token {unknown[0]} is not in pieces")


def _same(found: int, wanted: int, message: str) -> None:
    if found != wanted:
        raise ValueError(message.format(found, wanted))
