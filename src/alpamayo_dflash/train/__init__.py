"""Training of drafts: data, losses, the trainer, and the simulated acceptance length.

The stage is `alpamayo_dflash.train.run.run`; only its config is imported here, because torch is heavy.
"""

from __future__ import annotations

from alpamayo_dflash.train.config import TrainConfig

__all__ = ["TrainConfig"]
