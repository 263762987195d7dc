"""The hub's cache layout, as far as a dataset that is only read needs it."""

from __future__ import annotations

import re
from pathlib import Path

from alpamayo_dflash.common.fields import path_text

REPO_ID = "nvidia/PhysicalAI-Autonomous-Vehicles"
EGOMOTION = "egomotion"


def repo_folder(cache_dir: Path | str, repo_id: str = REPO_ID) -> Path:
    """Where the hub's cache keeps a dataset repository."""
    return Path(cache_dir) / f"datasets--{repo_id.replace('/', '--')}"


def find_snapshot(cache_dir: Path | str, revision: str = "main", repo_id: str = REPO_ID) -> Path:
    """The folder with a cached revision's files; its name is the revision's 40-digit hash.

    Raises:
        ValueError: the cache does not hold the dataset or the revision.
    """
    folder = repo_folder(cache_dir, repo_id)
    if not folder.is_dir():
        plain = (Path(cache_dir) / "clip_index.parquet").is_file()
        raise ValueError(
            f"{cache_dir} is no cache of the dataset {repo_id}: it has no folder {folder.name}"
            + " (it holds the dataset's files as they are; the hub's cache layout is what is read)" * plain
        )
    commit = path_text(revision, "revision")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        reference = folder / "refs" / revision
        if not reference.is_file():
            raise ValueError(f"{folder} holds no revision {revision!r}: there is no refs/{revision}")
        commit = reference.read_bytes()[:100].decode("utf-8", "replace").strip()
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError(f"{reference}: holds {commit!r}; it must be a commit of 40 digits")
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        raise ValueError(f"{folder} holds no snapshot {commit} (revision {revision!r})")
    return snapshot


def chunk_file(feature: str, chunk: int) -> str:
    """Where a snapshot keeps a chunk of one camera or of the ego motion."""
    group = "labels" if feature == EGOMOTION else "camera"
    return f"{group}/{feature}/{feature}.chunk_{chunk:04d}.zip"
