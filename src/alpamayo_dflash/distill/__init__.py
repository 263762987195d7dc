"""Distillation data: rollouts of the target, kept as sampled token ids, tapped states and top-k logits."""

from __future__ import annotations

from alpamayo_dflash.distill.config import DistillConfig
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.shards import DistillSample

__all__ = ["DistillConfig", "DistillData", "DistillSample"]
