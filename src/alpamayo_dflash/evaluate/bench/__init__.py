"""The engine's speed: every timing of one run beside its floor, and the figures made of them."""

from alpamayo_dflash.evaluate.bench.config import BenchConfig, BenchKernelsConfig
from alpamayo_dflash.evaluate.bench.figures import REPLAYED, figures, spread
from alpamayo_dflash.evaluate.bench.floors import floors

__all__ = ["REPLAYED", "BenchConfig", "BenchKernelsConfig", "figures", "floors", "spread"]
