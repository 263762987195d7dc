"""The tiny Alpamayo: its shape, its training on the world, and the checkpoint that ships with the package."""

from __future__ import annotations

from pathlib import Path

from alpamayo_dflash.tiny.config import MeasureTinyConfig, TinyTrainConfig

__all__ = ["MeasureTinyConfig", "TinyTrainConfig", "checkpoint_path", "world_figures_path"]


def checkpoint_path() -> Path:
    """The folder of the checkpoint that ships with the package."""
    return Path(__file__).parent / "checkpoint"


def world_figures_path() -> Path:
    """The world's figures, measured on the shipped checkpoint's rollouts (`measure-world`)."""
    return Path(__file__).parent / "world_tiny.json"
