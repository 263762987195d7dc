"""The subcommand that lists the clips of a dataset folder, and fetches chunks into it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ClipsConfig:
    """List a dataset's chunks and clips; with --prefetch, fetch chunks from the hub first.

    Attributes:
        cache_dir: hub cache folder that holds the dataset (or that `world` wrote).
        chunks: chunks to list or fetch, such as 0-3,7; if left out all that are there are listed.
        num_chunks: the first so many chunks, instead of `chunks`.
        cameras: dataset indices of the cameras that a chunk needs, such as 0,1,2,6.
        prefetch: fetch what the cache lacks of these chunks; what it holds is not fetched again.
        workers: files fetched at a time.
        revision: branch, tag or 40-digit hash of the dataset.

    Raises:
        ValueError: both or, with `prefetch`, neither of `chunks` and `num_chunks`; a number below 1.
    """

    cache_dir: Path
    chunks: str | None = None
    num_chunks: int | None = None
    cameras: str = "0,1,2,6"
    prefetch: bool = False
    workers: int = 8
    revision: str = "main"

    def __post_init__(self) -> None:
        """Check the options against each other."""
        if self.chunks is not None and self.num_chunks is not None:
            raise ValueError(f"chunks {self.chunks} and num_chunks {self.num_chunks} say the same; give one")
        if self.prefetch and self.chunks is None and self.num_chunks is None:
            raise ValueError("prefetch needs chunks (such as 0-3) or num_chunks; the whole dataset is huge")
        for name in ("num_chunks", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


def run(config: ClipsConfig) -> dict[str, Any]:
    """Fetch if asked, then count the clips of each chunk and name them.

    Raises:
        ValueError: no such folder, no clips in these chunks, or the hub cannot be reached.
    """
    from alpamayo_dflash.clips import ClipSource, parse_chunks
    from alpamayo_dflash.clips.fetch import download_chunks

    chunks = None if config.chunks is None else parse_chunks(config.chunks)
    if config.num_chunks is not None:
        chunks = list(range(config.num_chunks))
    cameras = parse_chunks(config.cameras)
    fetched: dict[str, Any] = {}
    if config.prefetch:
        assert chunks is not None, "checked by the config"
        found = download_chunks(
            config.cache_dir, chunks, cameras=cameras, workers=config.workers, revision=config.revision
        )
        chunks = sorted([*found.already, *found.done])
        fetched = {
            "prefetch": {
                "attempted": len(chunks) + len(found.failed),
                "already": len(found.already),
                "done": len(found.done),
                "failed": len(found.failed),
                "reasons": found.failed,
                "size_bytes": found.size_bytes,
            },
            "passed": not found.failed,
            "nothing_to_do": not found.failed and not found.done,
        }
        if not chunks:
            return fetched | {"clips": 0, "chunks": {}, "clip_ids": []}
    source = ClipSource(config.cache_dir, cameras=cameras, revision=config.revision)
    clip_ids = source.clip_ids(chunks)
    counts = Counter(source.chunk_of(clip_id) for clip_id in clip_ids)
    return fetched | {"clips": len(clip_ids), "chunks": dict(sorted(counts.items())), "clip_ids": clip_ids}
