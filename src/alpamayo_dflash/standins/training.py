"""Training the tiny Alpamayo: cross-entropy on the Chain-of-Causation, flow matching on the actions.

Shapes: B scenes, P prompt, G response, C hidden, L layers, K KV heads, D head dim, N way-points.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alpamayo_dflash.standins.config import TinyTrainConfig
from alpamayo_dflash.standins.scenes import IGNORE, Batch
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.expert import ActionPrefix
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.qwen3 import run_layers
from alpamayo_dflash.target.vision import encode_equal_images


@dataclass(frozen=True)
class Losses:
    """The two losses of a step, and the share of response tokens that the arg max gets right."""

    text: Tensor
    trajectory: Tensor
    accuracy: Tensor


class BatchForward:
    """The target's forward over a batch of windows that differ in content but not in shape.

    Args:
        target: the model.
        example: the prompt of any window: its grid and positions are those of all.
    """

    def __init__(self, target: Alpamayo, example: Prompt) -> None:
        self.target = target
        device = target.embedding.device
        self.grid_h, self.grid_w = (int(n) for n in example.image_grid_thw[0, 1:])
        self.prompt_length = example.input_ids.shape[0]
        self.rope_delta = example.rope_delta
        self.positions_3P = example.position_ids.to(device)
        self.image_positions = (example.input_ids == target.special.image_pad).nonzero().flatten().to(device)

    def position_ids(self, length: int) -> Tensor:
        """Positions of prompt and response, int64 [3, length]."""
        behind = torch.arange(self.prompt_length, length, device=self.positions_3P.device) + self.rope_delta
        return torch.cat((self.positions_3P, behind.expand(3, -1)), dim=1)

    def __call__(self, batch: Batch, pixel_noise: float) -> Losses:
        """Both losses of a batch; `pixel_noise` is a standard deviation in levels of 255."""
        target = self.target
        scenes, length = batch.input_ids.shape
        pixels = (batch.patches.float() - 127.5) / 127.5
        pixels = pixels + torch.randn_like(pixels) * (pixel_noise / 127.5)
        pixels = pixels.unflatten(-1, (3, 1, -1)).expand(-1, -1, -1, 2, -1).flatten(2).flatten(0, 1)
        embeds, deepstack = encode_equal_images(target.vlm.model.visual, pixels, self.grid_h, self.grid_w)

        hidden = functional.embedding(batch.input_ids, target.embedding)
        where = self.image_positions
        hidden = hidden.index_copy(1, where, embeds.view(scenes, len(where), -1).to(hidden.dtype))
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k)
            values.append(v)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ).transpose(1, 2)

        def after_layer(layer: int, out: Tensor) -> Tensor:
            if layer >= len(deepstack):
                return out
            return out.index_add(1, where, deepstack[layer].view(scenes, len(where), -1).to(out.dtype))

        rotary = target.rotary(self.position_ids(length))
        hidden = run_layers(target.text_layers, hidden, rotary, attend, after_layer)
        # Row i predicts token i + 1: the response's rows begin at the prompt's last.
        logits = target.logits(target.final_norm(hidden[:, self.prompt_length - 1 : -1]))
        text = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        kept = batch.labels != IGNORE
        accuracy = (logits.argmax(-1) == batch.labels)[kept].float().mean()
        prefix = ActionPrefix(
            keys=torch.stack(keys),
            values=torch.stack(values),
            lengths=batch.lengths,
            positions=batch.lengths + self.rope_delta,
        )
        return Losses(text, self._flow_matching(batch.action, prefix), accuracy)

    def _flow_matching(self, action: Tensor, prefix: ActionPrefix) -> Tensor:
        """Mean squared error of the velocity at t = 0.999 (1 - Beta(1.5, 1)) (specification 8.3)."""
        scenes = action.shape[0]
        uniform = torch.rand(scenes, device=action.device)
        t = 0.999 * (
            1 - uniform.pow(1 / 1.5)
        )  # the inverse distribution function of Beta(1.5, 1) is u^(1/1.5)
        noise = torch.randn_like(action)
        x = t[:, None, None] * action + (1 - t[:, None, None]) * noise
        return functional.mse_loss(self.target.velocity(x, t, prefix).float(), action - noise)


def learning_rate(config: TinyTrainConfig, progress: float, step: int) -> float:
    """Linear warm-up by steps, then a cosine to a fiftieth over `progress` 0 to 1."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def optimiser(target: Alpamayo, config: TinyTrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in target.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in target.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=config.device != "cpu")


def train_steps(
    target: Alpamayo, forward: BatchForward, batches: Iterator[Batch], config: TinyTrainConfig
) -> Iterator[dict[str, float]]:
    """Run the optimiser; yield a row of the log after every step.

    The schedule's progress is the larger of steps done over steps and time passed over the time limit, so
    that a run cut short by time still ends at the schedule's end.
    """
    adam = optimiser(target, config)
    started = time.monotonic()
    autocast = torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.device != "cpu")
    for step in range(config.steps):
        elapsed = time.monotonic() - started
        progress = step / config.steps
        if config.time_limit_s:
            progress = max(progress, elapsed / config.time_limit_s)
        for group in adam.param_groups:
            group["lr"] = learning_rate(config, progress, step)
        with autocast:
            losses = forward(next(batches).to(config.device), config.pixel_noise)
        (losses.text + config.trajectory_weight * losses.trajectory).backward()
        torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        row = {"step": step + 1, "lr": adam.param_groups[0]["lr"], "elapsed_s": elapsed, "progress": progress}
        yield row | {name: getattr(losses, name).detach() for name in ("text", "trajectory", "accuracy")}
        if progress >= 1.0:
            return
