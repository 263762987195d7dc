"""The subcommand that lists the clips of a dataset folder."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ClipsConfig:
    """List a dataset's chunks and clips.

    Attributes:
        cache_dir: hub cache folder that holds the dataset (or that `world` wrote).
        chunks: chunks to list, such as 0-3,7; all where it is left out.
    """

    cache_dir: Path
    chunks: str | None = None


def run(config: ClipsConfig) -> dict[str, Any]:
    """Count the clips of each chunk and name them.

    Raises:
        ValueError: no such folder, or no clips in these chunks.
    """
    from alpamayo_dflash.clips import ClipSource, parse_chunks

    source = ClipSource(config.cache_dir)
    clip_ids = source.clip_ids(None if config.chunks is None else parse_chunks(config.chunks))
    counts = Counter(source.chunk_of(clip_id) for clip_id in clip_ids)
    return {"clips": len(clip_ids), "chunks": dict(sorted(counts.items())), "clip_ids": clip_ids}
