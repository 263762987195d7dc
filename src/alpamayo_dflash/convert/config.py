"""The options of the conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alpamayo_dflash.target.formats import TargetOptions


@dataclass(frozen=True)
class ConvertConfig(TargetOptions):
    """Write a checkpoint in the official layout with weights in FP8, to be loaded from then on.

    Attributes:
        checkpoint: folder or hub id of the Alpamayo checkpoint, or tiny.
        out: folder of the new checkpoint.
        device: where weights are cast; the bits are the same on all.
        local_files_only: never ask the hub for the checkpoint.
    """

    checkpoint: str
    out: Path
    device: str = "cpu"
    local_files_only: bool = False

    def __post_init__(self) -> None:
        """Check that something is to be converted."""
        if not self.target_format.fp8:
            raise ValueError(
                "nothing to convert: weights, expert_weights and vision_weights are all 'checkpoint'; give "
                "weights fp8"
            )
