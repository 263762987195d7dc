"""The shape of an evaluation's or a window's JSON object: what the reports read, checked before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import checked, is_number, naming
from alpamayo_dflash.common.options import check_range
from alpamayo_dflash.report.clip_trace import RoundRow, check_round_row
from alpamayo_dflash.report.tables import ARM_NAMES, WINDOW_PARTS, WORLD_FIGURES

_MOST = 1e15
"""Beyond any time, count or error that was measured, and within what a plot's axis takes."""


class _Failure(TypedDict):
    clip_id: str
    error: str


class _Clips(TypedDict):
    attempted: int
    done: int
    failed: int
    failures: list[_Failure]


class _Lossless(TypedDict):
    greedy_identical: int
    sampled_identical: int
    autoregressive_equals_transformers: int
    of: int
    near_ties: NotRequired[int]
    not_near_ties: NotRequired[int]


class _Arm(TypedDict):
    prefill_ms: float
    decode_ms: float
    action_ms: float
    total_ms: float
    tokens_per_s: float | None


class _Place(TypedDict):
    token: int | None
    piece: str | None


class _Difference(TypedDict):
    clip_id: str
    sample: int
    kind: Literal["token", "round", "coc"]
    message: str
    position: NotRequired[int]
    stored: NotRequired[_Place]
    own: NotRequired[_Place]


class _Audit(TypedDict):
    clips: int
    equal: int
    near_ties: int
    differences: list[_Difference]
    failures: list[_Failure]
    passed: bool


class _Trajectory(TypedDict):
    min_ade_m: float
    constant_velocity_min_ade_m: float


class _Named(TypedDict):
    both: float


class _Part(TypedDict):
    ms: float
    share: float | None


class _Trace(TypedDict):
    clips: int
    lacking: int
    unequal: int
    trace_bytes_per_clip: float
    trace_ms_per_clip: float


class _Entry(TypedDict):
    step: int
    acceptance_length: float | None


class _Training(TypedDict):
    evaluations: list[_Entry]


class _Times(TypedDict):
    tokens: int
    decode_ms: float
    preprocess_ms: NotRequired[float | None]
    vision_ms: NotRequired[float | None]
    prompt_ms: NotRequired[float | None]
    prefill_ms: NotRequired[float]
    action_ms: NotRequired[float]
    total_ms: NotRequired[float]


class _Acceptance(TypedDict):
    tokens_after_first: int
    passes: int
    drafted: NotRequired[int]
    accepted: NotRequired[int]
    draft_failures: NotRequired[int]


class _Identity(TypedDict):
    greedy: bool
    sampled: bool
    autoregressive_equals_transformers: bool
    near_ties: NotRequired[int]
    not_near_ties: NotRequired[int]


class _Errors(TypedDict):
    min_ade_m: float
    constant_velocity_ade_m: float


class _NamedRow(TypedDict):
    manoeuvre: bool
    cause: bool


class _TraceRow(TypedDict):
    bytes: int
    ms: float
    equal: bool


class _Row(TypedDict):
    clip_id: str
    coc: list[str]
    arms: dict[str, _Times]
    acceptance: _Acceptance
    identity: NotRequired[_Identity]
    trajectory: NotRequired[_Errors]
    named: NotRequired[_NamedRow]
    parts_ms: NotRequired[dict[str, float]]
    rounds: NotRequired[list[list[RoundRow]]]
    trace: NotRequired[_TraceRow]


class _Settings(TypedDict):
    lossless_mode: NotRequired[bool]
    sentence_end: NotRequired[str]


class _Origin(TypedDict):
    versions: dict[str, str]
    device: str
    revision: str | None
    created: str
    command: str


class _Greedy(TypedDict):
    acceptance_length: float | None
    acceptance_rate: float | None
    arms: dict[str, _Arm]
    speedup: dict[str, Any] | None


class Evaluation(TypedDict):
    """What is read of an evaluation, or of a demo's summary; older ones lack what need not be there."""

    clips: _Clips
    lossless: _Lossless
    acceptance_length: float | None
    acceptance_rate: float | None
    arms: dict[str, _Arm]
    speedup: dict[str, Any] | None
    clip_rows: NotRequired[list[_Row]]
    settings: NotRequired[_Settings | None]
    draft_failures: NotRequired[int | None]
    trajectory: NotRequired[_Trajectory | None]
    coc_names: NotRequired[_Named | None]
    decode_parts: NotRequired[dict[str, _Part] | None]
    sources: NotRequired[dict[str, int] | None]
    trace: NotRequired[_Trace | None]
    audit: NotRequired[_Audit | None]
    greedy: NotRequired[_Greedy | None]
    training: NotRequired[_Training | None]
    world: NotRequired[dict[str, float] | None]
    world_here: NotRequired[dict[str, float] | None]
    world_bounds: NotRequired[dict[str, tuple[float, float]] | None]
    provenance: NotRequired[_Origin | None]


class _Gpu(TypedDict):
    name: str


class _Card(TypedDict):
    ours_1: dict[str, float]


class _FloorRow(TypedDict):
    what: str
    arm: str
    measured_ms: float
    floor_ms: float
    bound: str
    over_floor: float


class _Floors(TypedDict):
    rows: list[_FloorRow]


class WindowResults(TypedDict):
    """What is read of the results of `bench --window`."""

    parts: dict[str, dict[str, float]]
    gpu: NotRequired[_Gpu | None]
    cards: NotRequired[dict[str, _Card] | None]
    floors: NotRequired[_Floors | None]
    replayed: NotRequired[list[str] | None]
    provenance: NotRequired[_Origin | None]


def read_window(path: Path) -> dict[str, Any]:
    """Read the results of `bench --window`.

    Raises:
        ValueError: they are missing or none; the message names file and key.
    """
    result = read_json(path, "parts")
    with naming(str(path)):
        found = checked(result, WindowResults, "results")
        if "ours_1" not in found["parts"]:
            raise ValueError("parts lacks ours_1, the window with one sample")
        others = {name: card["ours_1"] for name, card in (found.get("cards") or {}).items()}
        for arm, parts in (*found["parts"].items(), *others.items()):
            unknown = set(parts) - {*WINDOW_PARTS, "whole"}
            if unknown:
                raise ValueError(
                    f"parts of {arm!r:.200} are {sorted(unknown)!r:.200}; known are {WINDOW_PARTS}"
                )
            check_range(0, _MOST, **{f"{arm[:100]}.{part}": ms for part, ms in parts.items()})
    return result


def read_evaluation(path: Path, *, rounds: bool = True) -> dict[str, Any]:
    """Read an evaluation's JSON object, or a demo's summary.

    Args:
        path: the file.
        rounds: hold stored rounds to themselves, as who shows them needs it; an audit finds more by itself.

    Raises:
        ValueError: it is missing or none; the message names file and key.
    """
    result = read_json(path)
    lacking = [key for key in ("clips", "lossless", "arms", "acceptance_length") if key not in result]
    if lacking:
        raise ValueError(f"{path}: not an evaluation; it lacks {', '.join(lacking)}")
    with naming(str(path)):
        _check(checked(result, Evaluation, "evaluation"))
        for row in result.get("clip_rows", []) if rounds else []:
            _check_rounds(row)
    return result


def _check(result: dict[str, Any]) -> None:
    """What the kinds of the values do not say: which arms, figures and parts belong together."""
    rows = result.get("clip_rows", [])
    evaluations = [result, result["greedy"]] if result.get("greedy") else [result]
    for found in (*(each["arms"] for each in evaluations), *(row["arms"] for row in rows)):
        if not set(found) <= set(ARM_NAMES) or (rows and set(found) != set(rows[0]["arms"])):
            raise ValueError(f"arms are {sorted(found)!r:.200}; known are {', '.join(ARM_NAMES)}")
    if rows and len(rows[0]["arms"]) not in (1, len(ARM_NAMES)):
        raise ValueError(f"clip_rows have the arms {sorted(rows[0]['arms'])}; one or all are compared")
    for key in ("world", "world_bounds"):
        lacking = [name for name in WORLD_FIGURES if name not in (result.get(key) or {})]
        if lacking and result.get(key):
            raise ValueError(f"{key} lacks {', '.join(lacking)}")
    for row in rows:
        _check_row(row)
    for each in (result.get("audit") or {}).get("differences", []):
        if each["kind"] == "token" and not {"stored", "own"} <= each.keys():
            raise ValueError("audit.differences: one of kind 'token' lacks stored or own")
    for each in evaluations:
        for name, value in (each["speedup"] or {}).items():
            if name != "quartiles":
                checked(value, float | None, f"speedup.{name}")
    _check_sizes(result, "")


def _check_row(row: dict[str, Any]) -> None:
    """A clip's numbers can be shown."""
    where = f"clip {row['clip_id']!r:.80}"
    counted = ("tokens_after_first", "passes", "drafted", "accepted", "draft_failures")
    for name in counted:
        check_range(0, _MOST, **{f"{where}: {name}": row["acceptance"].get(name)})
    for arm, times in row["arms"].items():
        for name, value in times.items():
            if is_number(value):
                check_range(0, _MOST, **{f"{where}: {arm}.{name}": value})
    for group in ("trajectory", "parts_ms"):
        for name, value in row.get(group, {}).items():
            if is_number(value):
                check_range(0, _MOST, **{f"{where}: {group}.{name[:80]}": value})


def _check_rounds(row: dict[str, Any]) -> None:
    """A clip's rounds agree with themselves."""
    with naming(f"clip {row['clip_id']!r:.80}"):
        for each in (round_ for sample in row.get("rounds", []) for round_ in sample):
            check_round_row(each)
            check_range(0, _MOST, position=each["position"])


def _check_sizes(value: Any, place: str) -> None:
    """Numbers that a table or a plot cannot show are refused by name."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in ("head", "provenance", "settings", "clip_rows", "audit"):
                _check_sizes(each, f"{place}.{key}" if place else key)
    elif isinstance(value, (int, float)):
        check_range(-_MOST, _MOST, **{place[:200]: value})
