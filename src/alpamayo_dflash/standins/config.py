"""The tiny Alpamayo's training options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alpamayo_dflash.common.options import check_above_zero, check_at_least, check_positive, check_whole
from alpamayo_dflash.standins.blueprint import RandomCheckpointConfig, RandomSize
from alpamayo_dflash.target.formats import TargetOptions


@dataclass(frozen=True)
class TinyTrainConfig:
    """Train the tiny Alpamayo on the synthetic world and write its checkpoint in the official layout.

    Attributes:
        out: folder of the checkpoint (config.json, model.safetensors, vlm/, training.json).
        steps: optimiser steps.
        batch_size: scenes a step; every scene is drawn anew.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: of AdamW, on matrices only.
        trajectory_weight: weight of the flow-matching loss beside the cross-entropy.
        pixel_noise: standard deviation of the noise added to pixels, in levels of 255 (video coding's scale).
        workers: processes that draw scenes.
        seed: of weights, scenes and order.
        device: torch device.
        init_from: a checkpoint of the same shape, or tiny, to go on from; none starts from random weights.
        validate_every: steps between looks at held-out scenes.
        validate_scenes: held-out scenes of such a look.
        time_limit_s: stop (with a finished schedule) when this much time has passed; 0 is no limit.
    """

    out: Path = Path("runs/tiny")
    steps: int = 1150
    batch_size: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.02
    trajectory_weight: float = 0.25
    pixel_noise: float = 3.0
    workers: int = 2
    seed: int = 0
    device: str = "cpu"
    init_from: str | None = None
    validate_every: int = 2000
    validate_scenes: int = 64
    time_limit_s: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(steps=self.steps, batch_size=self.batch_size)
        check_positive(validate_every=self.validate_every, validate_scenes=self.validate_scenes)
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; it must be at least 0 and below steps ({self.steps})"
            )
        check_above_zero(learning_rate=self.learning_rate)
        check_at_least(0, weight_decay=self.weight_decay, trajectory_weight=self.trajectory_weight)
        check_at_least(0, pixel_noise=self.pixel_noise, workers=self.workers, time_limit_s=self.time_limit_s)
        check_whole(seed=self.seed)


@dataclass(frozen=True)
class MeasureTinyConfig(TargetOptions):
    """Measure on held-out scenes whether a tiny checkpoint sees: its words on its own and on other images.

    Attributes:
        checkpoint: folder or hub id, or tiny.
        scenes: how many held-out scenes.
        seed: of the scenes.
        out: the JSON file to write.
        device: torch device.
    """

    checkpoint: str = "tiny"
    scenes: int = 500
    seed: int = 0
    out: Path = Path("docs/results/tiny_sees.json")
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_at_least(2, scenes=self.scenes)  # to swap their images
        check_whole(seed=self.seed)


@dataclass(frozen=True)
class WriteRandomTargetConfig:
    """Write a checkpoint with random weights in the official layout.

    Attributes:
        out: folder of the checkpoint.
        size: r1-10b has the R1 release's sizes (22 GB on disk); medium (1.3 GB) and small (2 MB) its layout.
        seed: of the weights.
        device: where they are drawn; a GPU is much faster, and gives other values than the CPU.
    """

    out: Path
    size: RandomSize = "r1-10b"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the ranges."""
        _ = self.checkpoint

    @property
    def checkpoint(self) -> RandomCheckpointConfig:
        """The checkpoint's own config."""
        return RandomCheckpointConfig(self.size, self.seed, self.device)


def world_figures_path() -> Path:
    """The world's figures, measured on the shipped checkpoint's rollouts (`measure-world`)."""
    return Path(__file__).parent / "world_tiny.json"
