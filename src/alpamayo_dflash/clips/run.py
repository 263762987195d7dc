"""The subcommand that lists the clips of a dataset folder, and fetches chunks into it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from alpamayo_dflash.clips.config import ClipsConfig
from alpamayo_dflash.clips.fetch import Download, download_chunks
from alpamayo_dflash.clips.lists import parse_cameras, parse_chunks, read_clip_list
from alpamayo_dflash.clips.source import ClipSource


def run(config: ClipsConfig) -> dict[str, Any]:
    """Fetch if asked, then count the clips of each chunk and name them.

    Raises:
        ValueError: no such folder, no clips in these chunks, an unknown clip, or the hub cannot be reached.
    """
    chunks = parse_chunks(config.chunks)
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
    """The JSON line's part on a fetch; warns if the later steps read another revision."""
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
