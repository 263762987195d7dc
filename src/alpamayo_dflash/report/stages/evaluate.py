"""`evaluate`: its rows while it runs, and its result."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from alpamayo_dflash.common.fields import checked, is_number, naming
from alpamayo_dflash.common.options import check_at_least
from alpamayo_dflash.report.evaluation import read_evaluation
from alpamayo_dflash.report.files import Files, Lines, modified
from alpamayo_dflash.report.stages.reading import Named, Reading, last


class _Head(TypedDict):
    clips: list[str]


class _Accepted(TypedDict):
    tokens_after_first: int
    passes: int
    drafted: int
    accepted: int
    draft_failures: NotRequired[int]


class _Identity(TypedDict):
    greedy: bool
    sampled: bool
    not_near_ties: NotRequired[int]


class _Row(TypedDict):
    clip_id: str
    coc: list[str]
    acceptance: _Accepted
    identity: NotRequired[_Identity]


_COUNTED = ("tokens_after_first", "passes", "drafted", "accepted", "draft_failures")
_SAME = ("greedy_identical", "sampled_identical", "not_near_ties")


class _Rows:
    """What the rows of an evaluation that runs add up to."""

    def __init__(self, path: Path, texts: int) -> None:
        self.lines = Lines(path)
        self.kept = texts
        self.begin()

    def begin(self) -> None:
        """Forget the rows: the file is another."""
        self.head: dict[str, Any] | None = None
        self.clips: set[str] = set()
        self.texts: deque[Named] = deque(maxlen=self.kept)
        self.lengths: list[float] = []
        self.sums = dict.fromkeys(
            ("tokens_after_first", "passes", "drafted", "accepted", "draft_failures"), 0
        )
        self.equal = dict.fromkeys(
            ("clips_compared", "greedy_identical", "sampled_identical", "not_near_ties"), 0
        )

    def read(self) -> bool:
        """Read on; whether the file is there and has its head."""
        return self.lines.follow(self.begin, self._take) and self.head is not None

    def _take(self, line: dict[str, Any], where: str) -> None:
        if self.head is None:
            self.head = checked(line, _Head, where)
            return
        row = checked(line, _Row, where)
        with naming(where):
            check_at_least(0, **{name: row["acceptance"].get(name) for name in _COUNTED})
        self.clips.add(row["clip_id"])
        self.texts.extend((row["clip_id"], text) for text in row["coc"][:1])
        for name in self.sums:
            self.sums[name] += row["acceptance"].get(name, 0)
        if row["acceptance"]["passes"]:
            self.lengths.append(row["acceptance"]["tokens_after_first"] / row["acceptance"]["passes"])
        identity = row.get("identity")
        if identity is not None:
            self.equal["clips_compared"] += 1
            self.equal["greedy_identical"] += identity["greedy"]
            self.equal["sampled_identical"] += identity["sampled"]
            self.equal["not_near_ties"] += identity.get("not_near_ties", 0)

    def reading(self) -> Reading:
        """The rows as they stand, if there is a head."""
        assert self.head is not None
        figures: dict[str, float] = {}
        if self.sums["passes"]:
            figures["acceptance_length"] = self.sums["tokens_after_first"] / self.sums["passes"]
        if self.sums["drafted"]:
            figures["acceptance_rate"] = self.sums["accepted"] / self.sums["drafted"]
        figures["draft_failures"] = self.sums["draft_failures"]
        return Reading(
            "evaluate",
            "clips",
            len(self.clips),
            len(self.head["clips"]),
            finished=False,
            texts=tuple(self.texts),
            curves={"acceptance by clip": tuple(self.lengths)} if self.lengths else {},
            figures=figures | (self.equal if self.equal["clips_compared"] else {}),
            notes=("failed clips are written at the end, and counted then",),
        )


class EvaluateReader:
    """`evaluate`: a row a clip while it runs, `evaluation.json` at the end."""

    def __init__(self, folder: Path, files: Files, texts: int) -> None:
        self.files, self.kept = files, texts
        self.result, self.rows = folder / "evaluation.json", _Rows(folder / "rows.jsonl", texts)

    def __call__(self, since: float) -> Reading | None:
        """See StageReader."""
        begun = self.rows.read()
        result = self.files.read(self.result, partial(_read_evaluation, count=self.kept))
        if begun and (result is None or (self._rows_are_newer() and (since or self._is_other(result.head)))):
            return self.rows.reading()
        return None if result is None else result.reading

    def _rows_are_newer(self) -> bool:
        return (modified(self.rows.lines.path) or 0) > (modified(self.result) or 0)

    def _is_other(self, head: dict[str, Any] | None) -> bool:
        """Whether rows are of another evaluation than the result; of one whose clips failed they stay."""
        assert self.rows.head is not None
        rows = {key: value for key, value in self.rows.head.items() if key != "format"}
        return head is not None and head != rows


@dataclass(frozen=True)
class _Result:
    """What is kept of a written evaluation; older ones have no head."""

    reading: Reading
    head: dict[str, Any] | None


def _read_evaluation(path: Path, count: int) -> _Result:
    content = read_evaluation(path)
    clips, rows = content["clips"], content.get("clip_rows", [])
    with naming(str(path)):
        check_at_least(0, **{name: clips[name] for name in ("attempted", "done", "failed")})
    names = ("acceptance_length", "acceptance_rate", "draft_failures")
    figures = {name: content[name] for name in names if is_number(content.get(name))}
    lossless = content["lossless"]
    if lossless["of"]:
        same = ("greedy_identical", "sampled_identical", "not_near_ties")
        figures |= {
            "clips_compared": lossless["of"],
            **{key: lossless[key] for key in same if key in lossless},
        }
    failures = tuple((failure["clip_id"], failure["error"]) for failure in clips["failures"])
    audit = content.get("audit")
    notes = () if audit is None else (f"audit {'passed' if audit['passed'] else 'failed'}",)
    reading = Reading(
        "evaluate",
        "clips",
        clips["attempted"],
        clips["attempted"],
        finished=True,
        failed=clips["failed"],
        failures=last(failures, count),
        texts=last([(row["clip_id"], row["coc"][0]) for row in rows if row["coc"]], count),
        figures=figures,
        notes=notes,
    )
    return _Result(reading, checked(content.get("head"), dict | None, f"{path}: head"))
