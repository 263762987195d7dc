"""One run as the page shows it: an evaluation with what lies beside it, or a benchmark of windows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import checked, naming
from alpamayo_dflash.common.options import check_range
from alpamayo_dflash.report.evaluation import read_evaluation, read_window

SUMMARY, EVALUATION, TRACE = "summary.json", "evaluation.json", "trace"
_MOST = 1e15


class _Scores(TypedDict):
    cosine: list[float]
    early_exit_ce: dict[str, float]
    target_layers: list[int]
    tokens: int


class _Evaluation(TypedDict):
    step: int
    acceptance_length: float | None
    expected_acceptance_length: NotRequired[float | None]
    real_acceptance_length: NotRequired[float | None]
    real_greedy_acceptance_length: NotRequired[float | None]


class _Training(TypedDict):
    evaluations: list[_Evaluation]
    losses: NotRequired[list[dict[str, Any]]]
    best_step: NotRequired[int | None]


@dataclass(frozen=True)
class Series:
    """Rows that are shown as one: an evaluation's, under the name that charts give it."""

    name: str
    result: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """What one run wrote.

    Attributes:
        name: what the page calls it; no two runs of a page have one name.
        path: the file that it was read from.
        evaluation: the evaluation's JSON object, or the demo's summary; None for a benchmark.
        rows: its clips' rows.
        traces: the folder that holds a folder a clip, where the evaluation traced; None where it did not.
        greedy: the greedy evaluation of a demo; where its folder is gone what the summary keeps of it.
        layers: the scores of both steps that chose the taps, with the choice.
        training: the losses and the evaluations over training.
        bench: the results of `bench --window`; None for an evaluation.
        alone: whether the page shows no other run; its charts then need not say its name.
    """

    name: str
    path: Path
    evaluation: Mapping[str, Any] | None = None
    rows: Sequence[Mapping[str, Any]] = ()
    traces: Path | None = None
    greedy: Mapping[str, Any] | None = None
    layers: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    alone: bool = False
    series: tuple[Series, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Name what charts show."""
        found = []
        if self.evaluation is not None:
            beside = self.alone and self.greedy is not None
            found.append(Series("sampled" if beside else self.name, self.evaluation, self.rows))
        if self.greedy is not None:
            name = "greedy" if self.alone else f"{self.name}, greedy"
            found.append(Series(name, self.greedy, self.greedy.get("clip_rows", [])))
        object.__setattr__(self, "series", tuple(found))

    @property
    def failures(self) -> Sequence[Mapping[str, Any]]:
        """The clips that failed, each with its `clip_id` and `error`."""
        found: Sequence[Mapping[str, Any]] = (
            () if self.evaluation is None else self.evaluation["clips"]["failures"]
        )
        return found


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs, in order.

    Args:
        paths: of each run a demo's folder or its summary.json, an evaluation's folder or its evaluation.json,
            or the results of `bench --window`.

    Raises:
        ValueError: there is none, one is named twice, or one is missing or damaged; the message names it.
    """
    if not paths:
        raise ValueError("no run is given; name an evaluation.json, or the folder of an evaluation or a demo")
    files = [_file_of(path) for path in paths]
    resolved = [file.resolve() for file in files]
    for file, other in itertools.combinations(resolved, 2):
        if file == other:
            raise ValueError(f"{file} is given twice; name each run once")
    names = _names(resolved)
    return [_read(file, name, alone=len(files) == 1) for file, name in zip(files, names, strict=True)]


def _file_of(path: Path) -> Path:
    """The file that holds a run's numbers."""
    if not path.is_dir():
        return path
    for file in (path / SUMMARY, path / EVALUATION, path / "evaluation" / EVALUATION):
        if file.is_file():
            return file
    raise ValueError(
        f"{path}: holds neither {SUMMARY} nor {EVALUATION}; a run is a finished demo's or evaluation's folder"
    )


def _names(files: Sequence[Path]) -> list[str]:
    """The shortest names that tell the runs apart: a folder's, with as many folders above it as it takes."""
    parts = [
        file.parent.parts if file.name in (SUMMARY, EVALUATION) else file.with_suffix("").parts
        for file in files
    ]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]


def _read(file: Path, name: str, *, alone: bool) -> Run:
    content = read_json(file)
    if "parts" in content:
        return Run(name, file, bench=read_window(file), alone=alone)
    result, folder = read_evaluation(file), file.parent
    demo = folder if file.name == SUMMARY else folder.parent
    is_demo = file.name == SUMMARY or (demo / "layers").is_dir()
    traces = (folder / "evaluation" if file.name == SUMMARY else folder) / TRACE
    greedy = demo / "evaluation-greedy" / EVALUATION
    has_greedy = is_demo and greedy.is_file() and greedy.resolve() != file.resolve()
    return Run(
        name,
        file,
        evaluation=result,
        rows=result.get("clip_rows", []),
        traces=traces if traces.is_dir() else None,
        greedy=read_evaluation(greedy) if has_greedy else result.get("greedy"),
        layers=_read_layers(demo / "layers" / "layers.json") if is_demo else None,
        training=_read_training(demo / "train" / "train.json", result) if is_demo else result.get("training"),
        alone=alone,
    )


def _read_layers(file: Path) -> Mapping[str, Any] | None:
    """The scores of layers; None where they are not there."""
    if not file.is_file():
        return None
    content: dict[str, Any] = checked(read_json(file), _Scores, str(file))
    with naming(str(file)):
        for layer, value in content["early_exit_ce"].items():
            if not layer.isascii() or not layer.isdecimal() or len(layer) > 9:
                raise ValueError(f"early_exit_ce has {layer!r:.80}; its keys must be numbers of layers")
            check_range(-_MOST, _MOST, early_exit_ce=value)
        for value in content["cosine"]:
            check_range(-_MOST, _MOST, cosine=value)
    return content


def _read_training(file: Path, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The whole training's numbers; where its file is gone what the summary keeps of them."""
    if not file.is_file():
        return result.get("training")
    content: dict[str, Any] = checked(read_json(file), _Training, str(file))
    return content
