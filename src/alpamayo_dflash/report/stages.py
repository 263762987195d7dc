"""How far a stage has come, told by the files that it writes anyway: layers, distill, train, evaluate.

Each reader knows the files of one stage and says what they hold, or None where a folder is not of its stage.
Whether somebody still works on it is for `report.watch` to judge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import checked, is_number
from alpamayo_dflash.common.options import check_at_least, check_range
from alpamayo_dflash.common.tables import read_columns
from alpamayo_dflash.report.evaluation import read_evaluation
from alpamayo_dflash.report.events import EventLogs, Point
from alpamayo_dflash.report.files import Files, Lines, listed, modified

Named = tuple[str, str]
"""A clip's id, and a text about it."""

Mark = tuple[float, float]
"""A moment, in seconds since 1970, and how much was done by then."""

_MARKS = 20
"""Of so many last marks the rate is taken."""

_MOST_RANKS = 2**16


@dataclass(frozen=True)
class Reading:
    """What a stage's files hold.

    Attributes:
        kind: the stage.
        unit: what is counted: clips, steps or ranks.
        done: how many, failed clips among them.
        total: of how many; None where no file says it.
        finished: whether the stage's last file is there.
        marks: when how much was done, in order and of the present run; empty where the files do not say it.
        failed: clips that failed; None where the stage writes that at its end.
        failures: those of them that are known, with the reasons.
        texts: CoCs, the last ones last.
        curves: name to numbers in order.
        figures: name to number.
        notes: where what is shown comes from, and what is not known.
        silent: whether nothing is written before a rank's end.
    """

    kind: str
    unit: str
    done: int
    total: int | None
    finished: bool
    marks: tuple[Mark, ...] = ()
    failed: int | None = None
    failures: tuple[Named, ...] = ()
    texts: tuple[Named, ...] = ()
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    silent: bool = False


class StageReader(Protocol):
    """Reads one folder, again and again."""

    def __call__(self, since: float) -> Reading | None:
        """What the folder holds of the stage; None if it is none.

        Args:
            since: when the present run began, seconds since 1970; 0 if none is known.

        Raises:
            ValueError: a file is damaged; the message names it.
        """


def _last(named: Sequence[Named], count: int) -> tuple[Named, ...]:
    """The last so many."""
    return tuple(named[max(0, len(named) - count) :])


# --- layers


class _Counts(TypedDict):
    attempted: int
    done: int
    failed: int


class _Failure(TypedDict):
    clip_id: str
    reason: str


class _Sums(TypedDict):
    tokens: int


class _Scores(TypedDict):
    clips: _Counts
    failures: list[_Failure]
    scores: _Sums


class _Choice(TypedDict):
    target_layers: list[int]


@dataclass(frozen=True)
class _Scored:
    """What is kept of a rank's scores."""

    clips: _Counts
    failures: tuple[Named, ...]
    tokens: int


def _read_scores(path: Path) -> _Scored:
    content = checked(read_json(path), _Scores, str(path))
    check_at_least(0, **content["clips"])
    return _Scored(content["clips"], _failures(content["failures"]), content["scores"]["tokens"])


def _read_choice(path: Path) -> list[int]:
    layers: list[int] = checked(read_json(path), _Choice, str(path))["target_layers"]
    return layers


def _failures(entries: Iterable[_Failure]) -> tuple[Named, ...]:
    return tuple((entry["clip_id"], entry["reason"]) for entry in entries)


class LayersReader:
    """`layers`: each rank writes its scores when it is done, and the choice comes last."""

    def __init__(self, folder: Path, files: Files, texts: int) -> None:
        self.folder, self.files, self.kept = folder, files, texts

    def __call__(self, since: float) -> Reading | None:
        """See StageReader."""
        paths = listed(self.folder, "scores-rank*of*.json")
        chosen = self.files.read(self.folder / "layers.json", _read_choice)
        if not paths and chosen is None:
            return None
        # Of several numbers of ranks the last that was used.
        size = max(paths, key=lambda path: modified(path) or 0).stem.rpartition("of")[2] if paths else "0"
        scores = [
            found
            for path in paths
            if path.stem.endswith(f"of{size}") and (found := self.files.read(path, _read_scores))
        ]
        figures = {"clips": sum(each.clips["done"] for each in scores)}
        figures["tokens"] = sum(each.tokens for each in scores)
        notes = ["a rank's scores are written when it is done"]
        if chosen is not None:
            notes = [f"chosen: {', '.join(map(str, chosen))}"]
        elif size == str(len(scores)):
            notes = ["every rank is done; `layers --aggregate` pools them and chooses"]
        return Reading(
            "layers",
            "ranks",
            len(scores),
            int(size) if size.isdecimal() and 0 < int(size) <= _MOST_RANKS else None,
            finished=chosen is not None,
            failed=sum(each.clips["failed"] for each in scores),
            failures=_last([failure for each in scores for failure in each.failures], self.kept),
            figures=figures,
            notes=tuple(notes),
            silent=True,
        )


# --- distill


class _Shard(TypedDict):
    file: str | None
    clips: list[str]
    failures: list[_Failure]
    samples: int
    tokens: int
    bytes: int


class _Settings(TypedDict):
    world_size: int


class _Manifest(TypedDict):
    settings: _Settings
    shards: list[_Shard]
    complete: bool
    num_clips: NotRequired[int]


class _Failures(TypedDict):
    attempted: int
    failed: int
    failures: list[_Failure]


@dataclass(frozen=True)
class _Part:
    """What is kept of a rank's manifest; a written shard is a moment and the clips that it took."""

    world_size: int
    num_clips: int | None
    complete: bool
    attempted: int
    counts: Mapping[str, int]
    written: tuple[Mark, ...]


def _read_part(path: Path) -> _Part:
    content = checked(read_json(path), _Manifest, str(path))
    shards = content["shards"]
    check_range(1, _MOST_RANKS, world_size=content["settings"]["world_size"])
    check_at_least(0, num_clips=content.get("num_clips"))
    times = [
        (at, len(shard["clips"]) + len(shard["failures"]))
        for shard in shards[-_MARKS - 1 :]
        if shard["file"] is not None and (at := modified(path.parent / "shards" / shard["file"]))
    ]
    done = {clip_id for shard in shards for clip_id in shard["clips"]}
    failed = {failure["clip_id"] for shard in shards for failure in shard["failures"]} - done
    return _Part(
        world_size=content["settings"]["world_size"],
        num_clips=content.get("num_clips"),
        complete=content["complete"],
        attempted=len(done) + len(failed),
        counts={
            "responses": sum(shard["samples"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "bytes": sum(shard["bytes"] for shard in shards),
        },
        written=tuple(times),
    )


def _read_failures(path: Path) -> tuple[int, tuple[Named, ...]]:
    content = checked(read_json(path), _Failures, str(path))
    return content["failed"], _failures(content["failures"])


def _last_texts(path: Path, count: int) -> tuple[Named, ...]:
    """The last greedy CoCs of a table of samples."""
    table = read_columns(path, {"clip_id": str, "sample": int, "text": str}, str(path))
    rows = table.to_pylist()
    return _last([(row["clip_id"], row["text"]) for row in rows if row["sample"] == 0], count)


class DistillReader:
    """`distill`: a rank's manifest lists its finished shards, whose files say when they were written."""

    def __init__(self, folder: Path, files: Files, texts: int) -> None:
        self.folder, self.files, self.kept = folder, files, texts

    def __call__(self, since: float) -> Reading | None:
        """See StageReader."""
        paths = listed(self.folder, "manifest-rank*.json")
        parts = [part for path in paths if (part := self.files.read(path, _read_part))]
        if not parts:
            return None
        failed = [
            found
            for path in listed(self.folder, "failures-rank*.json")
            if (found := self.files.read(path, _read_failures))
        ]
        size, totals = parts[0].world_size, [part.num_clips for part in parts]
        known = [total for total in totals if total is not None]
        ready = sum(part.complete for part in parts)
        notes = []
        if len(known) < len(totals):
            notes.append("the manifests are of an older version and do not say how many clips there are")
        if size > 1:
            notes.append(f"ranks: {len(parts)} of {size} have begun, {ready} are done")
        names = ("responses", "tokens", "bytes")
        return Reading(
            "distill",
            "clips",
            sum(part.attempted for part in parts),
            sum(known) if len(known) == len(totals) else None,
            finished=ready == size,
            marks=_marks([mark for part in parts for mark in part.written], since),
            failed=sum(count for count, _ in failed),
            failures=_last([failure for _, found in failed for failure in found], self.kept),
            texts=self._texts(),
            figures={name: sum(part.counts[name] for part in parts) for name in names},
            notes=tuple(notes),
        )

    def _texts(self) -> tuple[Named, ...]:
        """Of the rank that wrote last."""
        paths = listed(self.folder, "samples-rank*.parquet")
        if not paths:
            return ()
        last = max(paths, key=lambda path: modified(path) or 0)
        return self.files.read(last, partial(_last_texts, count=self.kept)) or ()


def _marks(written: Iterable[Mark], since: float) -> tuple[Mark, ...]:
    """How much was done when, by all ranks, from what each of them added when; with the run's beginning."""
    added = sorted((at, count) for at, count in written if at >= since)
    if not since or not added:
        return ()
    found, done = [(since, 0.0)], 0.0
    for at, count in added:
        done += count
        found.append((at, done))
    return tuple(found if len(added) == 1 else found[1:])[-_MARKS:]


# --- train


class _Progress(TypedDict):
    step: int
    best_step: int
    best_length: float
    evaluations: list[dict[str, Any]]
    losses: list[dict[str, Any]]


class _State(TypedDict):
    progress: _Progress
    total_steps: int


class _Summary(TypedDict):
    steps: int
    best_step: int
    acceptance_length: float
    evaluations: list[dict[str, Any]]
    losses: list[dict[str, Any]]


_Curves = dict[str, dict[int, float]]
_NO_LOSSES = frozenset(("step", "gradient_norm", "learning_rate", "labels_outside_vocab"))
_ACCEPTANCE = {
    "acceptance_length": "acceptance, simulated",
    "real_acceptance_length": "acceptance, real, sampled",
    "real_greedy_acceptance_length": "acceptance, real, greedy",
}
_COMPARED = {"real_differing": "clips_real_differs", "real_compared": "clips_real_compared"}


@dataclass(frozen=True)
class _Kept:
    """What is kept of a training's JSON: where it stood, and by name and step what was logged until then."""

    step: int
    total: int
    best_step: int
    best_length: float
    curves: _Curves


def _read_state(path: Path) -> _Kept:
    state = checked(read_json(path), _State, str(path))
    progress = state["progress"]
    curves = _curves(progress["losses"], progress["evaluations"])
    return _Kept(
        progress["step"], state["total_steps"], progress["best_step"], progress["best_length"], curves
    )


def _read_summary(path: Path) -> _Kept:
    found = checked(read_json(path), _Summary, str(path))
    steps, curves = found["steps"], _curves(found["losses"], found["evaluations"])
    return _Kept(steps, steps, found["best_step"], found["acceptance_length"], curves)


def _curves(losses: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> _Curves:
    """Name as in the event files to step to number."""
    found: _Curves = {}
    for group, entries in (("train", losses), ("held_out", evaluations)):
        for entry in entries:
            step = entry.get("step")
            for name, value in entry.items():
                if type(step) is int and name != "step" and is_number(value):
                    found.setdefault(f"{group}/{name}", {})[step] = float(value)
    return found


class TrainReader:
    """`train`: `train.json` at the end, the checkpoint at every evaluation, event files in between."""

    def __init__(self, folder: Path, files: Files, texts: int) -> None:
        self.folder, self.files, self.logs = folder, files, EventLogs(folder / "logs")

    def __call__(self, since: float) -> Reading | None:
        """See StageReader."""
        summary = self.files.read(self.folder / "train.json", _read_summary)
        state = self.files.read_in_exchange(self.folder / "checkpoint" / "trainer.json", _read_state)
        logged = self.logs.curves()
        kept = summary or state
        if kept is None and not logged:
            return None
        curves = _united({} if kept is None else kept.curves, logged)
        totals = [int(point.value) for point in logged.get("run/total_steps", [])]
        figures, best = {}, kept or _best(curves)
        if best is not None:
            figures = {"best_step": best.best_step, "best_acceptance_length": best.best_length}
        figures |= {
            shown: found[max(found)]
            for name, shown in _COMPARED.items()
            if (found := _held_out(curves, name))
        }
        return Reading(
            "train",
            "steps",
            max([*(step for found in curves.values() for step in found), 0 if kept is None else kept.step]),
            kept.total if kept is not None else (totals[-1] if totals else None),
            finished=summary is not None,
            marks=_steps(logged, since),
            curves=_shown_curves(curves),
            figures=figures,
            notes=(_sources(kept, logged),),
        )


def _united(kept: _Curves, logged: Mapping[str, Sequence[Point]]) -> _Curves:
    """What was kept with what was logged; of the run's own numbers nothing is a curve."""
    names = {*kept, *(tag for tag in logged if not tag.startswith("run/"))}
    return {
        name: dict(
            sorted((kept.get(name, {}) | {point.step: point.value for point in logged.get(name, ())}).items())
        )
        for name in sorted(names)
    }


def _held_out(curves: _Curves, name: str) -> dict[int, float]:
    return curves.get(f"held_out/{name}", {})


def _best(curves: _Curves) -> _Kept | None:
    """The best draft so far by what was logged, chosen as the trainer does."""
    found = _held_out(curves, "real_acceptance_length") or _held_out(curves, "acceptance_length")
    if not found:
        return None
    step = max(found, key=lambda each: (found[each], -each))
    return _Kept(0, 0, step, found[step], {})


def _shown_curves(curves: _Curves) -> dict[str, Sequence[float]]:
    """The losses and the acceptance lengths, by the names that they are shown by."""
    shown: dict[str, Sequence[float]] = {}
    for name, found in curves.items():
        group, _, rest = name.partition("/")
        if group == "train" and rest not in _NO_LOSSES:
            shown[f"loss, {rest}"] = tuple(found.values())
    for name, words in _ACCEPTANCE.items():
        if found := _held_out(curves, name):
            shown[words] = tuple(found.values())
    return shown


def _steps(logged: Mapping[str, Sequence[Point]], since: float) -> tuple[Mark, ...]:
    """When which step was logged by the present run."""
    points = {point.step: point.at for tag, found in logged.items() for point in found if "/" in tag}
    marks = sorted((at, float(step)) for step, at in points.items() if at >= since > 0)
    return tuple(marks)[-_MARKS:]


def _sources(kept: _Kept | None, logged: Mapping[str, Sequence[Point]]) -> str:
    """Where a training's numbers come from."""
    steps = [point.step for tag, found in logged.items() for point in found if not tag.startswith("run/")]
    parts = [f"event files up to step {max(steps)}"] if steps else []
    parts += [] if kept is None else [f"checkpoint or summary of step {kept.step}"]
    return f"numbers: {' and '.join(parts) or 'none yet'}"


# --- evaluate


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
        check_at_least(0, **row["acceptance"])
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
        failures=_last(failures, count),
        texts=_last([(row["clip_id"], row["coc"][0]) for row in rows if row["coc"]], count),
        figures=figures,
        notes=notes,
    )
    return _Result(reading, checked(content.get("head"), dict | None, f"{path}: head"))


# --- the synthetic world, of a demo


class _Size(TypedDict):
    num_chunks: int
    clips_per_chunk: int


class _World(TypedDict):
    world: _Size
    complete: bool


def _read_world(path: Path) -> Reading:
    content = checked(read_json(path), _World, str(path))
    total = content["world"]["num_chunks"] * content["world"]["clips_per_chunk"]
    notes = () if content["complete"] else ("how many clips are written is not said before the end",)
    complete = content["complete"]
    return Reading("world", "clips", total if complete else 0, total, complete, notes=notes, silent=True)


class WorldReader:
    """`world`: its manifest says how large it is, and at the end that it is whole."""

    def __init__(self, folder: Path, files: Files, texts: int) -> None:
        self.folder, self.files = folder, files

    def __call__(self, since: float) -> Reading | None:
        """See StageReader."""
        return self.files.read(self.folder / "world.json", _read_world)


READERS = (WorldReader, LayersReader, DistillReader, TrainReader, EvaluateReader)
"""In the order in which stages follow each other."""
