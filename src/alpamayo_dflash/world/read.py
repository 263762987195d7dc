"""Reading back what the clips of a synthetic world are about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alpamayo_dflash.clips.cache import find_snapshot
from alpamayo_dflash.clips.layout import check_clip_id
from alpamayo_dflash.common.fields import naming
from alpamayo_dflash.common.tables import read_columns
from alpamayo_dflash.world.facts import Event, Facts

SCENES_FILE = "metadata/world_scenes.parquet"
_COLUMNS = {"clip_id": str, "chunk": int, "seed": int, "event": str, "side": str, "actor": str, "coc": str}


@dataclass(frozen=True)
class SceneRecord:
    """What one clip is about.

    Attributes:
        clip_id: the clip.
        chunk: its chunk.
        seed: the number that `sample_scene` drew the scene from.
        facts: the scene's facts.
        coc: one wording of them, drawn at random.
    """

    clip_id: str
    chunk: int
    seed: int
    facts: Facts
    coc: str


def read_scenes(cache_dir: Path | str) -> list[SceneRecord]:
    """The records of a world's clips, in order of chunk and index.

    Raises:
        ValueError: the folder holds no world.
    """
    path = find_snapshot(cache_dir) / SCENES_FILE
    if not path.is_file():
        raise ValueError(f"{path.parent.parent} is no synthetic world: it has no {SCENES_FILE}")
    rows = read_columns(path, _COLUMNS, str(path)).to_pylist()
    with naming(str(path)):
        return [
            SceneRecord(
                check_clip_id(row["clip_id"], "clip_id"),
                row["chunk"],
                row["seed"],
                Facts(Event(row["event"]), row["side"], row["actor"]),
                row["coc"],
            )
            for row in rows
        ]


def read_facts(cache_dir: Path | str) -> dict[str, Facts]:
    """The facts of a world's clips by clip id.

    Raises:
        ValueError: the folder holds no world.
    """
    return {record.clip_id: record.facts for record in read_scenes(cache_dir)}
