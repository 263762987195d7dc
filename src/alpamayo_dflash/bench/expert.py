"""The action expert's forms beside their floors, for `bench --window`.

The cache behind a prompt is filled with random keys and values: they take the same time as a prompt's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.bench.clocks import event_ms, wall_ms
from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.figures import SIX
from alpamayo_dflash.bench.floors import TextShape, expert_work
from alpamayo_dflash.decode.cache import Cache
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.expert_fused import FusedExpert, SampleTexts, why_plain_expert
from alpamayo_dflash.target.quantised import is_fp8

_PROMPT = 3007
"""Tokens of R1's prompt with 16 images."""
_FEW = 20
"""The least repeats of what is slow."""


def expert_counts(target: Alpamayo) -> dict[str, Any]:
    """What the expert's floors are counted from."""
    shape = expert_shape(target)
    return expert_sizes(target) | {
        "expert_parameter_bytes": sum(p.numel() * p.element_size() for p in _parameters(target)),
        "expert_bytes": expert_work(shape, _PROMPT, target.n_waypoints).bytes,
        "expert_operations": {
            str(samples): expert_work(shape, _PROMPT, samples * target.n_waypoints).operations
            for samples in (1, SIX)
        },
    }


def expert_sizes(target: Alpamayo) -> dict[str, Any]:
    """How much the expert does: steps, way-points, its shape, and the prompt that is timed."""
    return {
        "steps": target.config.num_inference_steps,
        "expert_shape": asdict(expert_shape(target)),
        "waypoints": target.n_waypoints,
        "expert_prompt_tokens": _PROMPT,
    }


def expert(config: BenchConfig, target: Alpamayo) -> dict[str, Any]:
    """Raw timings of both forms, with one sample and six."""
    raw: dict[str, Any] = {
        "text_tokens": config.text_tokens,
        "expert_plain_because": why_plain_expert(target),
        "expert_ms": {},
        "expert_call_ms": {},
    }
    cache = _filled(target)
    fast = FusedExpert(target, cache) if raw["expert_plain_because"] is None else None
    repeats = max(_FEW, config.repeats) if target.device.type == "cuda" else config.repeats
    for samples in (1, SIX):
        _time(raw, target, cache, fast, samples=samples, repeats=repeats)
    return raw


def _time(
    raw: dict[str, Any],
    target: Alpamayo,
    cache: Cache,
    fast: FusedExpert | None,
    *,
    samples: int,
    repeats: int,
) -> None:
    """Both forms with so many samples: steps alone (`expert_ms`), and from noise to trajectories."""
    device = target.device
    paths, offsets = _texts(raw["text_tokens"], samples)
    noise, past = _start(target, samples)
    prefix = cache.prefix(paths, offsets, 0)

    def plain() -> None:
        target.trajectory(target.denoise(noise, prefix), *past)

    raw["expert_ms"][f"plain_{samples}"] = wall_ms(lambda: target.denoise(noise, prefix), repeats, device)
    raw["expert_call_ms"][f"plain_{samples}"] = wall_ms(plain, repeats, device)
    if fast is None:
        return
    texts = SampleTexts(paths, [_PROMPT + offset for offset in offsets])

    def fused() -> None:
        fast(fast.start(noise, *past), texts)

    raw["expert_call_ms"][f"fused_{samples}"] = wall_ms(fused, repeats, device)
    raw["expert_ms"][f"fused_{samples}"] = event_ms(lambda: fast.replay(samples), repeats, device)


def expert_steps(target: Alpamayo, tokens: int, samples: int) -> Callable[[], object]:
    """What runs the steps after texts of so many tokens: captured, or the plain form where that runs."""
    cache = _filled(target)
    paths, offsets = _texts(tokens, samples)
    noise, past = _start(target, samples)
    if why_plain_expert(target) is not None:
        return partial(target.denoise, noise, cache.prefix(paths, offsets, 0))
    fast = FusedExpert(target, cache)
    fast(fast.start(noise, *past), SampleTexts(paths, [_PROMPT + offset for offset in offsets]))
    return partial(fast.replay, samples)


def _texts(tokens: int, samples: int) -> tuple[list[list[int]], list[int]]:
    """Of each sample's text the slots and the count."""
    paths = [list(range(tokens * sample, tokens * (sample + 1))) for sample in range(samples)]
    return paths, [tokens] * samples


def _start(target: Alpamayo, samples: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Noise, and a vehicle that drove straight on."""
    device = target.device
    positions = torch.zeros(16, 3, device=device)
    positions[:, 0] = torch.arange(-15.0, 1.0, device=device)
    turns = torch.eye(3, device=device).repeat(16, 1, 1)
    return torch.randn(samples, target.n_waypoints, 2, device=device), (positions, turns)


def expert_shape(target: Alpamayo) -> TextShape:
    """The sizes of a target's expert, which has no vocabulary."""
    config: Any = target.expert.config
    return TextShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp=config.intermediate_size,
        vocab=0,
        element_bytes=target.embedding.element_size(),
        fp8=is_fp8(target.weight_formats["expert"]),
    )


def _parameters(target: Alpamayo) -> list[torch.nn.Parameter]:
    parts = (target.expert, target.action_in_proj, target.action_out_proj)
    return [parameter for part in parts for parameter in part.parameters()]


def _filled(target: Alpamayo) -> Cache:
    """A cache that holds a prompt and texts of random keys and values."""
    cache = Cache(target, prompt_capacity=_PROMPT, num_taps=0, context_len=0)
    for tensor in (cache.keys, cache.values):
        tensor.normal_()
    cache.begin_prompt(_PROMPT)
    return cache
