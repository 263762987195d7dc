"""The subcommand that lists the clips of a dataset folder, and fetches chunks into it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alpamayo_dflash.clips.fetch import Download


@dataclass(frozen=True)
class ClipsConfig:
    """List a dataset's chunks and clips; with --prefetch, fetch chunks from the hub first.

    Attributes:
        cache_dir: hub cache folder that holds the dataset (or that `world` wrote).
        chunks: chunks to list or fetch, such as 0-3,7; if left out all that are there are listed.
        num_chunks: the first so many chunks, instead of `chunks`.
        clip_ids: file with clip ids, one a line (or JSON or Parquet), instead of `chunks`: these clips are
            listed, and the chunks that they lie in are fetched.
        cameras: dataset indices of the cameras that a chunk needs, such as 0,1,2,6.
        prefetch: fetch what the cache lacks of these chunks; what it holds is not fetched again.
        workers: files fetched at a time.
        revision: branch, tag or 40-digit hash of the dataset. The later steps read what the cache calls
            `main`; a cache without a `main` gets the first revision that is fetched for it.

    Raises:
        ValueError: more than one or, with `prefetch`, none of `chunks`, `num_chunks` and `clip_ids`; a number
            below 1.
    """

    cache_dir: Path
    chunks: str | None = None
    num_chunks: int | None = None
    clip_ids: Path | None = None
    cameras: str = "0,1,2,6"
    prefetch: bool = False
    workers: int = 8
    revision: str = "main"

    def __post_init__(self) -> None:
        """Check the options against each other."""
        named = [name for name in ("chunks", "num_chunks", "clip_ids") if getattr(self, name) is not None]
        if len(named) > 1:
            given = " and ".join(f"{name} {getattr(self, name)}" for name in named)
            raise ValueError(f"{given} say the same; give one")
        if self.prefetch and not named:
            raise ValueError(
                "prefetch needs chunks (such as 0-3), num_chunks or clip_ids; the whole dataset is huge"
            )
        for name in ("num_chunks", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


def run(config: ClipsConfig) -> dict[str, Any]:
    """Fetch if asked, then count the clips of each chunk and name them.

    Raises:
        ValueError: no such folder, no clips in these chunks, an unknown clip, or the hub cannot be reached.
    """
    from alpamayo_dflash.clips import ClipSource, parse_cameras, parse_chunks, read_clip_list
    from alpamayo_dflash.clips.fetch import download_chunks

    chunks = None if config.chunks is None else parse_chunks(config.chunks)
    if config.num_chunks is not None:
        chunks = list(range(config.num_chunks))
    listed = None if config.clip_ids is None else set(read_clip_list(config.clip_ids))
    cameras = parse_cameras(config.cameras)
    fetched: dict[str, Any] = {}
    if config.prefetch:
        found = download_chunks(
            config.cache_dir,
            chunks or (),
            clip_ids=sorted(listed or ()),
            cameras=cameras,
            workers=config.workers,
            revision=config.revision,
        )
        chunks = sorted([*found.already, *found.done])
        fetched = _summary(found)
        if not chunks:
            return fetched | {"clips": 0, "chunks": {}, "clip_ids": []}
    source = ClipSource(config.cache_dir, cameras=cameras, revision=config.revision)
    if listed is not None and chunks is None:
        chunks = sorted({source.chunk_of(clip_id) for clip_id in listed})
    clip_ids = [each for each in source.clip_ids(chunks) if listed is None or each in listed]
    counts = Counter(source.chunk_of(clip_id) for clip_id in clip_ids)
    return fetched | {"clips": len(clip_ids), "chunks": dict(sorted(counts.items())), "clip_ids": clip_ids}


def _summary(found: Download) -> dict[str, Any]:
    """What the JSON line says of a fetch; that the later steps read another revision is said aloud too."""
    if found.main != found.revision:
        print(
            f"alpamayo-dflash clips: fetched revision {found.revision}, but this cache's `main`, which the "
            f"later steps read, is {found.main}; to use the former there, fetch it into a new cache folder",
            file=sys.stderr,
        )
    return {
        "prefetch": {
            "attempted": len(found.already) + len(found.done) + len(found.failed),
            "already": len(found.already),
            "done": len(found.done),
            "failed": len(found.failed),
            "reasons": found.failed,
            "size_bytes": found.size_bytes,
            "revision": found.revision,
            "main": found.main,
        },
        "passed": not found.failed,
        "nothing_to_do": not found.failed and not found.done,
    }
