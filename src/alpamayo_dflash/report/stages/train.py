"""`train`: its summary, its checkpoint and its event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import checked, is_number, naming
from alpamayo_dflash.common.options import check_at_least, check_range
from alpamayo_dflash.report.events import EventLogs, Point
from alpamayo_dflash.report.files import Files
from alpamayo_dflash.report.stages.reading import MOST_MARKS, Mark, Reading


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
    "expected_acceptance_length": "acceptance, expected, sampled",
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
    with naming(str(path)):
        check_range(0, state["total_steps"], step=progress["step"])
    curves = _curves(progress["losses"], progress["evaluations"])
    return _Kept(
        progress["step"], state["total_steps"], progress["best_step"], progress["best_length"], curves
    )


def _read_summary(path: Path) -> _Kept:
    found = checked(read_json(path), _Summary, str(path))
    with naming(str(path)):
        check_at_least(0, steps=found["steps"])
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
    choices = (_held_out(curves, f"{kind}acceptance_length") for kind in ("real_", "expected_", ""))
    found = next(filter(None, choices), None)
    if found is None:
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
    return tuple(marks)[-MOST_MARKS:]


def _sources(kept: _Kept | None, logged: Mapping[str, Sequence[Point]]) -> str:
    """Where a training's numbers come from."""
    steps = [point.step for tag, found in logged.items() for point in found if not tag.startswith("run/")]
    parts = [f"event files up to step {max(steps)}"] if steps else []
    parts += [] if kept is None else [f"checkpoint or summary of step {kept.step}"]
    return f"numbers: {' and '.join(parts) or 'none yet'}"
