"""The config of the `world` command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alpamayo_dflash.common.options import check_positive, check_range, check_whole


@dataclass(frozen=True)
class WorldConfig:
    """Write a synthetic world of clips that the devkit `physical_ai_av` reads offline.

    Attributes:
        out: folder to write; it serves as the devkit's `cache_dir`.
        num_chunks: chunks to write, numbered from 0.
        clips_per_chunk: clips in each chunk.
        seed: the world's seed; it fixes every scene.
        workers: processes that write chunks side by side; they change nothing in what is written.

    Raises:
        ValueError: a count below 1, or more than 10000 chunks.
    """

    out: Path
    num_chunks: int = 8
    clips_per_chunk: int = 50
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        """Check the counts."""
        check_range(1, 10_000, num_chunks=self.num_chunks)  # chunk numbers have four digits
        check_positive(clips_per_chunk=self.clips_per_chunk, workers=self.workers)
        check_whole(seed=self.seed)
