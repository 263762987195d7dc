"""The config of the `world` command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
        ValueError: a count below 1, or a negative seed.
    """

    out: Path
    num_chunks: int = 8
    clips_per_chunk: int = 50
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("num_chunks", "clips_per_chunk", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_chunks > 10_000:
            raise ValueError(
                f"num_chunks is {self.num_chunks}; chunk numbers have four digits, so at most 10000"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
