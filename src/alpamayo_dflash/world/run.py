"""The `world` command: a folder of synthetic clips that serves as the devkit's `cache_dir`."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from alpamayo_dflash.clips.cache import EGOMOTION, chunk_file, repo_folder
from alpamayo_dflash.common.artefacts import atomic_file, provenance, read_json, write_record, write_text
from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.events import sample_facts
from alpamayo_dflash.world.facts import EVENT_SHARES
from alpamayo_dflash.world.language import coc
from alpamayo_dflash.world.read import SCENES_FILE, SceneRecord
from alpamayo_dflash.world.scene import clip_id_of, scene_seed
from alpamayo_dflash.world.write import FEATURES, write_chunk, zip_members

MANIFEST = "world.json"
_FORMAT = 1  # raised when the same config would give other clips


def run(config: WorldConfig, *, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Write the world, or what is missing of it.

    The tables and `refs/main` come last, so that readers see a whole world or none. `world.json` in the
    folder says what it is.

    Args:
        config: see WorldConfig.
        size: height and width that the pictures are enlarged to, for clips as large as real ones; None leaves
            them as they are drawn.

    Returns:
        The folder, the revision, counts of clips by event, and whether anything was to be done.

    Raises:
        ValueError: the folder holds another world, or something that is none.
    """
    started = time.time()
    identity = _identity(config) | ({} if size is None else dict(zip(("height", "width"), size, strict=True)))
    revision = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:40]
    snapshot = repo_folder(config.out) / "snapshots" / revision
    complete = _claim(config.out, identity)
    records = list(_records(config))
    if not complete:
        _write_chunks(config, snapshot, size)
        _write_tables(snapshot, records)
        write_text(repo_folder(config.out) / "refs" / "main", revision)
        record = provenance(config, started)
        write_record(config.out / MANIFEST, {"world": identity, "complete": True, "provenance": record})
    events = Counter(record.facts.event for record in records)
    return {
        "out": str(config.out),
        "revision": revision,
        "clips": len(records),
        "chunks": config.num_chunks,
        "events": {event.value: events[event] for event in EVENT_SHARES},
        "status": "nothing to do" if complete else "written",
        "wall_s": round(time.time() - started, 3),
    }


def _identity(config: WorldConfig) -> dict[str, int]:
    """What fixes a world's content."""
    return {
        "format": _FORMAT,
        "num_chunks": config.num_chunks,
        "clips_per_chunk": config.clips_per_chunk,
        "seed": config.seed,
    }


def _claim(out: Path, identity: dict[str, int]) -> bool:
    """Make the folder this world's own; tells whether the world is there already, whole."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} holds something that is no world (no {MANIFEST}); choose another folder")
        write_record(manifest, {"world": identity, "complete": False})
        return False
    found = read_json(manifest)
    if found.get("world") != identity:
        raise ValueError(
            f"{out} holds another world: {found.get('world')} where {identity} is asked for; "
            "choose another folder, or delete this one"
        )
    return bool(found.get("complete"))


def _records(config: WorldConfig) -> Iterator[SceneRecord]:
    """What each clip is about, in order of chunk and index."""
    for chunk in range(config.num_chunks):
        for index in range(config.clips_per_chunk):
            seed = scene_seed(config.seed, chunk, index)
            facts = sample_facts(np.random.default_rng(seed))  # the scene's own first draws
            text = coc(facts, np.random.default_rng((seed, 2)))
            yield SceneRecord(clip_id_of(seed), chunk, seed, facts, text)


def _write_chunks(config: WorldConfig, snapshot: Path, size: tuple[int, int] | None) -> None:
    """Write all chunks, several at a time in processes of their own."""
    chunks = range(config.num_chunks)
    console = Console(stderr=True)
    workers = min(config.workers, config.num_chunks)
    if workers == 1:
        for chunk in track(chunks, "world: chunks", console=console):
            write_chunk(snapshot, config.seed, chunk, config.clips_per_chunk, size)
        return
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [
            pool.submit(write_chunk, snapshot, config.seed, chunk, config.clips_per_chunk, size)
            for chunk in chunks
        ]
        for task in track(as_completed(tasks), "world: chunks", total=len(tasks), console=console):
            task.result()


def _write_tables(snapshot: Path, records: list[SceneRecord]) -> None:
    """Write the dataset's tables and the world's own table of scenes."""
    with needs("clips"):
        import pandas as pd

    index = pd.Index([record.clip_id for record in records], name="clip_id")
    chunk = np.array([record.chunk for record in records], np.int64)
    tables = {
        "clip_index.parquet": {"clip_is_valid": True, "chunk": chunk},
        "metadata/feature_presence.parquet": dict.fromkeys(FEATURES, True),
        "metadata/data_collection.parquet": {"country": "synthetic", "platform_class": "synthetic"},
        SCENES_FILE: {
            "chunk": chunk,
            "seed": np.array([record.seed for record in records], np.int64),
            "event": [record.facts.event.value for record in records],
            "side": [record.facts.side for record in records],
            "actor": [record.facts.actor for record in records],
            "coc": [record.coc for record in records],
        },
    }
    for name, columns in tables.items():
        with atomic_file(snapshot / name) as temporary:
            pd.DataFrame(columns, index=index).to_parquet(temporary)
    features = pd.DataFrame(
        {
            "feature": FEATURES,
            "directory": ["labels" if feature == EGOMOTION else "camera" for feature in FEATURES],
            "chunk_path": [_chunk_template(feature) for feature in FEATURES],
            "clip_files_in_zip": [json.dumps(zip_members(feature)) for feature in FEATURES],
        }
    )
    write_text(snapshot / "features.csv", features.to_csv(index=False))


def _chunk_template(feature: str) -> str:
    """The name of a feature's chunk files with the devkit's placeholder for the number."""
    return chunk_file(feature, 0).replace("0000", "{chunk_id:04d}")
