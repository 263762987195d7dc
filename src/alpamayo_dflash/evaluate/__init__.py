"""The arms on the same clips: times, acceptance, losslessness and trajectory error, from held-out clips."""

from alpamayo_dflash.evaluate.config import (
    ARMS,
    DistributionConfig,
    EvaluateConfig,
    LosslessConfig,
    MeasureWorldConfig,
)

__all__ = ["ARMS", "DistributionConfig", "EvaluateConfig", "LosslessConfig", "MeasureWorldConfig"]
