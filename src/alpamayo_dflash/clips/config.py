"""The options of the command `clips`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alpamayo_dflash.common.options import check_positive

FrameRule = Literal["strict", "warn"]
MOTION_GAP_MS = 200
"""The longest gap in the ego motion that is bridged; the real set has about a hundred poses a second."""
DEFAULT_T0_US = 5_100_000
"""The default moment of a window, microseconds on its clip's clock."""


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
        check_positive(num_chunks=self.num_chunks, workers=self.workers)
