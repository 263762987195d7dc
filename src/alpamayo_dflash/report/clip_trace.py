"""The shape of a clip's trace, which `evaluate --trace` writes: what a page of the clip shows.

A trace is a folder: `clip.json` and the frames as small JPEG files.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, TypedDict, cast

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import checked, file_name, naming
from alpamayo_dflash.common.options import check_range

FILE = "clip.json"
_MOST = 1e6
"""Beyond any logit, time in ms and place in metres that a trace holds."""


class Place(TypedDict):
    """What target or draft thought of the token at one place; see `decode.observer.PlaceScores`."""

    ids: list[int]
    logits: list[float]
    log_sum_exp: float
    tempered_log_sum_exp: float
    nucleus_mass: float
    nucleus_logit: float
    chosen: int | None
    chosen_logit: float | None
    chosen_rank: int | None


class First(TypedDict):
    """A sample's first token, which the prompt's own pass gives."""

    token: int
    target: Place


class Round(TypedDict):
    """What a round did for a sample; see `decode.observer.SampleTrace` and `SampleScores`.

    `index` is the round's number: several samples share one.
    """

    index: int
    position: int
    anchor: int
    proposed: list[int]
    parents: list[int]
    sources: list[str]
    taken: list[int]
    emitted: list[int]
    origins: list[str]
    target: list[Place]
    at: list[int]
    draft: list[Place]


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
        first: by sample.
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
    first: list[First]
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


def probability(place: Place, logit: float, temperature: float) -> float:
    """How probable a token was at a place, in what the decode draws from (at temperature 1 if greedy).

    Args:
        place: of the target, or of the draft.
        logit: the token's there.
        temperature: the decode's.
    """
    if logit < place["nucleus_logit"]:
        return 0.0
    tempered = logit / (temperature or 1.0) - place["tempered_log_sum_exp"]
    return min(1.0, math.exp(min(0.0, tempered)) / place["nucleus_mass"])


def _check(trace: dict[str, Any]) -> None:
    """What the kinds of the values do not say: counts, indices and sizes."""
    samples = len(trace["coc"])
    for name in ("first", "rounds", "predicted_xy"):
        _same(len(trace[name]), samples, f"{name} has {{}} samples; coc has {{}}")
    check_range(0, _MOST, temperature=trace["temperature"])
    for each in trace["first"]:
        _check_place(each["target"], "first.target")
        _named(trace, [each["token"]], "first.token")
    for each in (round_ for sample in trace["rounds"] for round_ in sample):
        _check_round(each)
        _named(trace, [each["anchor"], *each["proposed"], *each["emitted"]], "rounds")
        for place in (*each["target"], *each["draft"]):
            _named(trace, place["ids"], "rounds")
    for bar in trace["bars"]:
        check_range(0, _MOST, start_ms=bar["start_ms"], end_ms=bar["end_ms"])
    for frame in trace["frames"]:
        file_name(frame["file"], "frames.file")
    paths = (trace["history_xy"], trace["future_xy"] or [], *trace["predicted_xy"])
    for point in (point for path in paths for point in path):
        check_range(-_MOST, _MOST, x=point[0], y=point[1])


def _check_round(each: dict[str, Any]) -> None:
    proposed, emitted = len(each["proposed"]), len(each["emitted"])
    for name in ("parents", "sources"):
        _same(len(each[name]), proposed, f"rounds: {name} has {{}} tokens; proposed has {{}}")
    for name in ("origins", "at"):
        _same(len(each[name]), emitted, f"rounds: {name} has {{}} tokens; emitted has {{}}")
    if len(each["target"]) <= proposed:
        raise ValueError(
            f"rounds: target has {len(each['target'])} places; it must have one after the anchor and after "
            f"each of {proposed} proposed tokens"
        )
    for node, parent in enumerate(each["parents"]):
        check_range(-1, node - 1, **{"rounds: parents": parent})
    for name, count in (("taken", proposed), ("at", len(each["target"]))):
        for index in each[name]:
            check_range(0, count - 1, **{f"rounds: {name}": index})
    for name in ("target", "draft"):
        for place in each[name]:
            _check_place(place, f"rounds.{name}")


def _check_place(place: dict[str, Any], where: str) -> None:
    _same(len(place["ids"]), len(place["logits"]), f"{where}: ids has {{}} tokens; logits has {{}}")
    numbers = [place[name] for name in ("log_sum_exp", "tempered_log_sum_exp", "nucleus_logit")]
    for number in (*numbers, *place["logits"], place["chosen_logit"] or 0.0):
        check_range(-_MOST, _MOST, **{where: number})
    if not 0 < place["nucleus_mass"] <= 1 + 1e-3:  # a float32 sum
        raise ValueError(f"{where}: nucleus_mass is {place['nucleus_mass']}; it must be above 0, at most 1")


def _named(trace: dict[str, Any], tokens: list[int], where: str) -> None:
    unknown = [token for token in tokens if str(token) not in trace["pieces"]]
    if unknown:
        raise ValueError(f"{where}: token {unknown[0]} is not in pieces")


def _same(found: int, wanted: int, message: str) -> None:
    if found != wanted:
        raise ValueError(message.format(found, wanted))
