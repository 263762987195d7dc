"""Training of drafts: data, losses, the trainer, and the simulated acceptance length."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from alpamayo_dflash.train.config import TrainConfig

__all__ = ["TrainConfig", "run"]

if TYPE_CHECKING:
    from alpamayo_dflash.train.run import run


def __getattr__(name: str) -> Any:
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("alpamayo_dflash.train.run").run
