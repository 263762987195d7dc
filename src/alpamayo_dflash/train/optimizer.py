"""The optimizer of a training run and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.config import TrainConfig

WARMUP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0


def make_optimizer(draft: DFlashDraft, config: TrainConfig, world_size: int) -> torch.optim.Optimizer:
    """AdamW: weight decay on matrices only, the embeddings at their own rate."""
    rate = config.learning_rate * (world_size if config.scale_lr else 1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in draft.named_parameters():
        if not parameter.requires_grad:
            continue
        embeds = name.startswith(("embed_tokens.", "lm_head."))
        decay = 0.0 if embeds or parameter.ndim < 2 else config.weight_decay
        groups.setdefault((rate * config.embed_lr_scale if embeds else rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1 over the first steps, then a cosine to 0 at `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
