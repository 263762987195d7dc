"""One clip's results as plain values, and the file that keeps them while an evaluation runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, NotRequired, TypedDict, TypeVar, cast

from alpamayo_dflash.common.artefacts import move_aside, to_plain, write_text
from alpamayo_dflash.common.fields import checked
from alpamayo_dflash.common.json_text import parse_json
from alpamayo_dflash.common.locks import mark_of
from alpamayo_dflash.common.records import sealed, unsealed
from alpamayo_dflash.evaluate.config import ARMS
from alpamayo_dflash.report.clip_trace import RoundRow


class ArmRow(TypedDict):
    """Times of one arm on one clip, in ms, and its tokens over all samples.

    `prefill_ms` is vision and the prompt's pass. What is not measured is null; the total leaves it out.
    """

    preprocess_ms: float | None
    vision_ms: float | None
    prompt_ms: float | None
    prefill_ms: float
    decode_ms: float
    action_ms: float
    total_ms: float
    tokens: int


class AcceptanceRow(TypedDict):
    """What the speculative loop did on one clip, over all samples.

    `tokens_after_first` counts through `<|traj_future_start|>`, `passes` the verify passes after the
    prompt's, each sample's own; `drafted` and `accepted` count drafted tokens; `draft_failures` the texts and
    rounds that the draft failed on (rows of older runs lack it).
    """

    tokens_after_first: int
    passes: int
    drafted: int
    accepted: int
    draft_failures: NotRequired[int]


class Identity(TypedDict):
    """Which outputs were equal, token for token, on one clip; over all samples.

    Of the loops' texts that differ, greedy and sampled, `near_ties` part where in bfloat16 they may (design,
    invariant 1), `not_near_ties` elsewhere. Rows of older runs lack the two.
    """

    greedy: bool
    sampled: bool
    autoregressive_equals_transformers: bool
    near_ties: NotRequired[int]
    not_near_ties: NotRequired[int]


class Trajectory(TypedDict):
    """Errors against the clip's own future, metres."""

    min_ade_m: float
    constant_velocity_ade_m: float


class Named(TypedDict):
    """Whether the first sample's CoC names the scene's manoeuvre and cause."""

    manoeuvre: bool
    cause: bool


class TraceRow(TypedDict):
    """The size of a clip's trace and the time to make it; whether it wrote the row's texts."""

    bytes: int
    ms: float
    equal: bool


class ClipRow(TypedDict):
    """All results of one clip that was done.

    A sample's text is its first token and what its rounds emitted, in ids. Rows of older runs lack the first
    tokens, or the rounds too: there, sources were not recorded.
    """

    clip_id: str
    prompt_tokens: int
    coc: list[str]
    arms: dict[str, ArmRow]
    acceptance: AcceptanceRow
    identity: NotRequired[Identity]
    trajectory: NotRequired[Trajectory]
    named: NotRequired[Named]
    parts_ms: NotRequired[dict[str, float]]
    first_tokens: NotRequired[list[int]]  # by sample, as are the rounds
    rounds: NotRequired[list[list[RoundRow]]]
    trace: NotRequired[TraceRow]


class Failure(TypedDict):
    """A clip that failed, and why; older results lack the kind."""

    clip_id: str
    error: str
    kind: NotRequired[str]


class LosslessRow(TypedDict):
    """Which outputs were equal on one clip, by the drafts' names; `differences` says where they were not."""

    clip_id: str
    autoregressive_equals_transformers: bool
    greedy: dict[str, bool]
    sampled: dict[str, bool]
    acceptance: dict[str, AcceptanceRow]
    differences: list[str]


Row = TypeVar("Row", ClipRow, LosslessRow)
FORMAT = 2
"""Of the rows; the first had neither times of parts nor rounds."""


def _checked_row(row: Any, where: str) -> Any:
    """A row of either kind; ValueError with the file and the key if it is none."""
    kind = ClipRow if "arms" in checked(row, dict, f"{where}: a row") else LosslessRow
    checked(row, kind, f"{where}: row {row.get('clip_id')!r:.80}")
    arms = row.get("arms", {}).keys()
    if arms and not {"dflash"} <= arms <= set(ARMS):
        raise ValueError(
            f"{where}: arms are {sorted(arms)!r:.200}; they must be dflash, or {', '.join(ARMS)}"
        )
    return row


class RowStore(Generic[Row]):
    """A JSON-lines file of results: a head line that names the run, then one line a clip.

    A store with another head (other options, another draft) is begun anew, and its rows are moved aside. A
    last line that was cut short by an interruption is dropped. Nothing is written before the first result.
    Each line carries a checksum and is held to it as it is read.

    Raises:
        ValueError: the file holds rows of another format, of a run that another version has not finished, or
            a line that is not what was written.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self._head = {"format": FORMAT} | json.loads(json.dumps(to_plain(head)))
        self._rows: dict[str, Row] = self._read()
        self._begun = False

    def _read(self) -> dict[str, Row]:
        if not self.path.exists():
            return {}
        lines = [line for line, _ in read_lines(self.path)]
        if lines and lines[0].get("format") != FORMAT:
            raise ValueError(
                f"{self.path}: an unfinished run of another version; finish it with that, or remove the file"
            )
        if not lines or lines[0] != self._head:
            return {}
        where = str(self.path)
        rows = [_checked_row(line, where) for line in lines[1:]]
        if len({frozenset(row.get("arms", {})) for row in rows}) > 1:
            raise ValueError(f"{where}: its rows have different arms; they are not of one run")
        return {row["clip_id"]: cast(Row, row) for row in rows}

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row) -> None:
        """Keep one clip's results, on disk before this returns."""
        if not self._begun:
            self._begin()
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(row))
        self._rows[row["clip_id"]] = row

    def _begin(self) -> None:
        """Write the head and the rows that are continued; rows of another run are moved aside."""
        if not self._rows and self.path.exists():
            head, *rows = self.path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            if rows:
                move_aside(self.path, mark_of(head), "another run's rows")
        lines = [self._head, *self._rows.values()]
        write_text(self.path, "".join(map(_line, lines)))
        self._begun = True

    def remove(self) -> None:
        """Remove the file: its rows are kept elsewhere now."""
        self.path.unlink(missing_ok=True)

    def rows(self) -> list[Row]:
        """The results so far, in the order in which they came."""
        return list(self._rows.values())


def read_lines(path: Path) -> list[tuple[dict[str, Any], bool]]:
    """Read a file of rows: each line's object, and whether it had a checksum.

    A last line that was cut short by an interruption is left out.

    Raises:
        ValueError: a line is not an object of JSON, or not what was written; file and line are named.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        where = f"{path}: line {number}"
        found.append(unsealed(checked(parse_json(line, where), dict, where), where))
    return found


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(sealed(row)) + "\n"
