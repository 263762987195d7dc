"""`layers`: each rank's scores, and the choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import checked, naming
from alpamayo_dflash.common.options import check_at_least
from alpamayo_dflash.report.files import Files, listed, modified
from alpamayo_dflash.report.stages.reading import MOST_RANKS, Failure, Named, Reading, last, named


class _Counts(TypedDict):
    attempted: int
    done: int
    failed: int


class _Sums(TypedDict):
    tokens: int


class _Scores(TypedDict):
    clips: _Counts
    failures: list[Failure]
    scores: _Sums


class _Choice(TypedDict):
    target_layers: list[int]


@dataclass(frozen=True)
class _Scored:
    """What is kept of a rank's scores."""

    clips: _Counts
    failures: list[Named]
    tokens: int


def _read_scores(path: Path) -> _Scored:
    content = checked(read_json(path), _Scores, str(path))
    with naming(str(path)):
        check_at_least(0, **content["clips"])
    return _Scored(content["clips"], named(content["failures"]), content["scores"]["tokens"])


def _read_choice(path: Path) -> list[int]:
    layers: list[int] = checked(read_json(path), _Choice, str(path))["target_layers"]
    return layers


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
            int(size) if size.isdecimal() and 0 < int(size) <= MOST_RANKS else None,
            finished=chosen is not None,
            failed=sum(each.clips["failed"] for each in scores),
            failures=last([failure for each in scores for failure in each.failures], self.kept),
            figures=figures,
            notes=tuple(notes),
            silent=True,
        )
