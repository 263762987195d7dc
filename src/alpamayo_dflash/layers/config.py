"""The config of layer scoring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alpamayo_dflash.clips.config import DEFAULT_T0_US, MOTION_GAP_MS, FrameRule
from alpamayo_dflash.common.options import check_positive, check_whole, parse_layers
from alpamayo_dflash.common.ranks import share_of
from alpamayo_dflash.decode.config import Sampled
from alpamayo_dflash.target.formats import TargetOptions


@dataclass(frozen=True)
class LayersConfig(Sampled, TargetOptions):
    """Score the target's layers on what it writes itself, and choose the layers to tap.

    Attributes:
        model_path: folder or hub id of the Alpamayo checkpoint, or tiny. Not needed with `aggregate`.
        cache_dir: hub cache that holds the dataset. Not needed with `aggregate`.
        output_dir: where the scores, `layers.json` and the plot go.
        chunks: chunks to draw clips from, such as 0-3,7; all where it is left out.
        num_samples: clips per rank, drawn at random without replacement; all, where there are fewer.
        rank: this process's number; taken from torchrun's RANK when absent.
        world_size: number of processes; taken from torchrun's WORLD_SIZE when absent.
        aggregate: score nothing: pool the scores of all ranks in `output_dir` and choose.
        plot: also draw cosine and early-exit cross-entropy by layer to `layers.png`.
        layers: candidates for early exit and for the choice, such as 0,16,24; all but the last if left out.
        num_target_layers: how many target layers to choose as taps.
        seed: seed of the drawn clips and of the rollouts.
        t0_us: the moment of each clip, microseconds on its clock.
        temperature: of the rollouts; 0 is greedy.
        top_p: nucleus of the rollouts.
        max_tokens: limit of new tokens a rollout.
        frames: what happens to a clip whose frames may not be those of its stamps: strict refuses it, warn
            reads them by their order and says so.
        motion_gap_ms: the longest gap in the ego motion that is bridged around a moment that is needed.
        device: torch device; plain "cuda" means this process's own under torchrun.
        dtype: of the target's weights; if left out float32 on a CPU, the checkpoint's own elsewhere.
        retry_failed: score again if a clip failed before; without it if a file of such a clip has changed.
        take_over: go on where the disk cannot tell whether another run has the folder.
        local_files_only: never ask the hub for the checkpoint.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    output_dir: Path
    model_path: str | None = None
    cache_dir: Path | None = None
    chunks: str | None = None
    num_samples: int = 32
    rank: int | None = None
    world_size: int | None = None
    aggregate: bool = False
    plot: bool = False
    layers: str | None = None
    num_target_layers: int = 5
    seed: int = 0
    t0_us: int = DEFAULT_T0_US
    temperature: float = 0.0
    top_p: float = 0.98
    max_tokens: int = 128
    frames: FrameRule = "strict"
    motion_gap_ms: int = MOTION_GAP_MS
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None
    local_files_only: bool = False
    retry_failed: bool = False
    take_over: bool = False

    def __post_init__(self) -> None:
        """Check every value that can be checked without the target."""
        check_positive(
            num_samples=self.num_samples, num_target_layers=self.num_target_layers, max_tokens=self.max_tokens
        )
        check_positive(motion_gap_ms=self.motion_gap_ms)
        _ = self.sampling
        check_whole(seed=self.seed, t0_us=self.t0_us)
        parse_layers(self.layers)
        if not self.aggregate or self.rank is not None:  # pooling takes a world_size alone
            share_of(self.rank, self.world_size, {})
        if not self.aggregate and (self.model_path is None or self.cache_dir is None):
            raise ValueError("scoring needs model_path and cache_dir; only aggregate does without")
