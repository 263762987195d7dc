"""The optimizers of a training run and their learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.config import TrainConfig

WARMUP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0

_MUON_PARTS = ("fc.", "layers.")
_EMBEDDINGS = ("embed_tokens.", "lm_head.")


class Optimizers:
    """Optimizers of different parameters, driven as one."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all: what is set in one, such as `lr`, holds from the next step on."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def state_of(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """What is kept of a parameter, by name; empty before the first step and for one that is frozen."""
        return next((part.state[parameter] for part in self.parts if parameter in part.state), {})

    def state_shapes(self) -> dict[nn.Parameter, dict[str, tuple[int, ...]]]:
        """Shapes of what is kept of each parameter after a step."""
        return {
            parameter: _adamw_state(parameter)
            if isinstance(part, torch.optim.AdamW)
            else _muon_state(parameter)
            for part in self.parts
            for parameter in _parameters(part)
        }

    def load_state(self, kept: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Put back what was kept of every parameter, on its device; tensors there already are taken over."""
        for part in self.parts:
            # An optimizer counts its parameters through its groups.
            state = {index: kept[parameter] for index, parameter in enumerate(_parameters(part))}
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _adamw_state(parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
    shape = tuple(parameter.shape)
    return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}


def _muon_state(parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
    return {"momentum_buffer": tuple(parameter.shape)}


def make_optimizer(draft: DFlashDraft, config: TrainConfig, world_size: int) -> Optimizers:
    """AdamW, or Muon with AdamW for what is no matrix inside the network.

    Muon (Jordan et al. 2024) takes the matrices of `fc` and of the layers; embeddings, the head and what a
    head on previous picks has stay with AdamW. Its step is 0.2·√(longer side) of an orthogonal matrix, which
    has the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate and one
    weight decay serve both.

    Raises:
        ValueError: this torch has no Muon.
    """
    rate = config.optimizer.learning_rate * (world_size if config.optimizer.scale_lr else 1)
    named = [(name, parameter) for name, parameter in draft.named_parameters() if parameter.requires_grad]
    if config.optimizer.optimizer == "adamw":
        return Optimizers(_adamw(named, config, rate))
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"optimizer is muon, which torch {torch.__version__} does not have; "
            "install torch 2.9 or later, or take adamw"
        )
    matrices = [each for each in named if each[0].startswith(_MUON_PARTS) and each[1].ndim == 2]
    muon = torch.optim.Muon(
        [parameter for _, parameter in matrices],
        lr=rate,
        weight_decay=config.optimizer.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    taken = {name for name, _ in matrices}
    return Optimizers(muon, _adamw([each for each in named if each[0] not in taken], config, rate))


def _adamw(named: list[tuple[str, nn.Parameter]], config: TrainConfig, rate: float) -> torch.optim.AdamW:
    """AdamW: weight decay on matrices only, the embeddings at their own rate."""
    options = config.optimizer
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        embeds = name.startswith(_EMBEDDINGS)
        decay = 0.0 if embeds or parameter.ndim < 2 else options.weight_decay
        groups.setdefault((rate * options.embed_lr_scale if embeds else rate, decay), []).append(parameter)
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
