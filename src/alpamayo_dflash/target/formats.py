"""Which format a target's weights are asked for in: the options that every command with a target has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weights = Literal["checkpoint", "fp8"]
"""`checkpoint`: as its files hold them. `fp8`: e4m3 with a scale a row, made from them as they are read."""

PARTS = ("text", "expert", "vision")
"""The parts of a target whose products may be in e4m3: its decoder, its action expert, its vision tower."""


@dataclass(frozen=True)
class TargetFormat:
    """The format of each part of a target.

    Attributes:
        text: of the text decoder's products; head, embedding and norms stay as they are.
        expert: of the action expert's products; its projections and norms stay as they are.
        vision: of the vision tower's products; patches, positions and norms stay as they are.
    """

    text: Weights = "checkpoint"
    expert: Weights = "checkpoint"
    vision: Weights = "checkpoint"

    def __post_init__(self) -> None:
        """Check the names."""
        for part in PARTS:
            found = getattr(self, part)
            if found not in ("checkpoint", "fp8"):
                option = "weights" if part == "text" else f"{part}_weights"
                raise ValueError(f"{option} is {found!r}; it must be 'checkpoint' or 'fp8'")

    @property
    def fp8(self) -> tuple[str, ...]:
        """The parts that are asked for in FP8."""
        return tuple(part for part in PARTS if getattr(self, part) == "fp8")


AS_STORED = TargetFormat()
"""As the checkpoint's files hold them."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The options of a stage that opens a target.

    Attributes:
        weights: format of the text decoder's products: `checkpoint`, as the files hold them, or `fp8`, made
            from them as they are read. FP8 is another target: its words can differ.
        expert_weights: the same for the action expert.
        vision_weights: the same for the vision tower.
    """

    weights: Weights = "checkpoint"
    expert_weights: Weights = "checkpoint"
    vision_weights: Weights = "checkpoint"

    @property
    def target_format(self) -> TargetFormat:
        """The format of each part; raises ValueError for a name that is not known."""
        return TargetFormat(self.weights, self.expert_weights, self.vision_weights)


OPTIONS = ("weights", "expert_weights", "vision_weights")
"""Names of the options."""
