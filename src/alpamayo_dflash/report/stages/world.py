"""`world`, the first stage of a demo: its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import checked
from alpamayo_dflash.report.files import Files
from alpamayo_dflash.report.stages.reading import Reading


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
