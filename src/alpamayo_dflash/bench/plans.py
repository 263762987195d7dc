"""`bench-kernels --plans`: the action expert's attention and products under many plans, at R1's sizes.

What is best on a card is written into `kernels/waypoints.PLANS` and `kernels/product.TUNED`. Every call is
timed as a graph over several layers or weights, so that the cache holds none of them.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alpamayo_dflash.bench.clocks import ceilings, graph_ms
from alpamayo_dflash.bench.config import BenchKernelsConfig
from alpamayo_dflash.bench.figures import medians
from alpamayo_dflash.bench.setup import gpu
from alpamayo_dflash.common.artefacts import provenance, write_json
from alpamayo_dflash.common.machine import current
from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.standins.blueprint import TargetShape
from alpamayo_dflash.target.expert_fused import BUCKETS

_ENOUGH_BYTES = 300 * 2**20
_SHOWN = 4
_TEXT = 17
_TILES = (
    (64, 32, 4, 3, None),
    (64, 32, 4, 4, 128),
    (64, 64, 4, 2, None),
    (64, 64, 4, 3, None),
    (64, 64, 8, 3, None),
    (64, 128, 4, 2, None),
    (128, 32, 8, 3, None),
    (128, 32, 8, 4, None),
    (128, 64, 8, 2, None),
    (128, 64, 8, 2, 128),
    (128, 64, 8, 3, None),
    (128, 128, 8, 2, None),
)
"""Rows, keys, warps, stages and the most registers of the plans of attention that are tried."""
_STRETCHES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20, 24)

Timings = dict[str, dict[str, list[float]]]
"""By what, then by plan: milliseconds."""


def run(config: BenchKernelsConfig, device: torch.device) -> dict[str, Any]:
    """Measure, print the best plans to standard error, and write all."""
    started, found = time.time(), dict[str, Any]()
    torch.manual_seed(generator_seed(config.seed))
    with torch.inference_mode(), current(device):
        raw: dict[str, Any] = ceilings(config.repeats, device, torch.bfloat16)
        for kind, measure in (("attention", _attention), ("products", _products)):
            if kind not in config.plan_kinds:
                continue
            raw[f"{kind}_ms"] = timings = measure(config, device)
            found[kind] = {what: _best(plans) for what, plans in timings.items()}
            made = provenance(config, started)
            write_json(config.out, {"best": found, "raw": raw, "gpu": gpu(device), "provenance": made})
    return {"best": found, "out": str(config.out)}


def _best(plans: dict[str, list[float]]) -> dict[str, float]:
    """The fastest plans, and the library's."""
    times: dict[str, float] = medians(plans)
    best = sorted(times, key=times.__getitem__)[:_SHOWN]
    return {name: times[name] for name in [*best, "library"] if name in times}


def _timed(out: dict[str, list[float]], name: str, call: Callable[[], object], config: Any) -> None:
    """Time a call; a plan that the card has not the registers or memory for is left out."""
    from triton.runtime.errors import OutOfResources

    try:
        out[name] = graph_ms(call, config.repeats, torch.device("cuda"))
    except OutOfResources as error:
        print(f"plans: {name}: {error}", file=sys.stderr)


def _attention(config: BenchKernelsConfig, device: torch.device) -> Timings:
    """All layers' attention of way-points, by samples."""
    from alpamayo_dflash.kernels.limits import shared_memory
    from alpamayo_dflash.kernels.waypoints import WaypointPlan, attend_waypoints, plan_of

    shape, count = TargetShape(), 64
    most = BUCKETS[-1] * count
    entries = (2, shape.layers, config.prompt + BUCKETS[-1] * _TEXT, shape.kv_heads, shape.head_dim)
    cache = torch.randn(entries, device=device, dtype=torch.bfloat16)
    own = torch.randn(2, most, shape.kv_heads, shape.head_dim, device=device, dtype=torch.bfloat16)
    q = torch.randn(most, shape.expert_heads, shape.head_dim, device=device, dtype=torch.bfloat16)
    length = torch.tensor([config.prompt], device=device)
    slots = torch.arange(BUCKETS[-1] * _TEXT, dtype=torch.int32, device=device).view(-1, _TEXT)
    texts = torch.full((BUCKETS[-1],), _TEXT, dtype=torch.int32, device=device)
    out: Timings = {}
    for samples in BUCKETS:
        rows, folded = samples * count, samples * count * shape.expert_heads // shape.kv_heads
        found: dict[str, list[float]] = {}
        for plan in dict.fromkeys([plan_of(folded), *attention_plans(folded, shape.kv_heads)]):
            if plan.fitted(shape.head_dim, shared_memory(device)) != plan:
                continue

            def every(plan: WaypointPlan = plan, rows: int = rows, samples: int = samples) -> None:
                for layer in range(shape.layers):
                    attend_waypoints(
                        q[:rows],
                        (cache[0, layer], cache[1, layer]),
                        (own[0, :rows], own[1, :rows]),
                        length,
                        texts[:samples],
                        slots[:samples],
                        plan,
                    )

            _timed(found, _name(plan), every, config)
        out[str(samples)] = found
        print(f"plans: attention, {samples} samples: {_best(found)}", file=sys.stderr, flush=True)
    return out


def attention_plans(folded: int, kv_heads: int) -> Iterator[Any]:
    """Plans that give between half and four times as many programs as an H100 has multiprocessors."""
    from alpamayo_dflash.kernels.waypoints import WaypointPlan

    for rows, keys, warps, stages, registers in _TILES:
        tiles = math.ceil(folded / rows) * kv_heads
        for stretches, apart in itertools.product(_STRETCHES, (False, True)):
            if 66 <= tiles * (stretches + apart) <= 528 and not (apart and stretches == 1):
                yield WaypointPlan(rows, keys, stretches, warps, stages, apart=apart, registers=registers)


def layer_shapes(hidden: int, heads: int, mlp: int) -> dict[str, tuple[int, int]]:
    """[N, I] of a layer's fused weights, with R1's KV heads and width of a head."""
    shape = TargetShape()
    queries, kv = heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "qkv": (queries + 2 * kv, hidden),
        "out": (hidden, queries),
        "gate_up": (2 * mlp, hidden),
        "down": (hidden, mlp),
    }


def expert_shapes() -> dict[str, tuple[int, int]]:
    """`layer_shapes` of the action expert."""
    shape = TargetShape()
    return layer_shapes(shape.expert_hidden, shape.expert_heads, shape.expert_mlp)


def _products(config: BenchKernelsConfig, device: torch.device) -> Timings:
    """The expert's products, by weight and rows: milliseconds of one, its gate included."""
    out: Timings = {}
    for name, (columns, inner) in expert_shapes().items():
        copies = math.ceil(_ENOUGH_BYTES / (2 * columns * inner))
        several = [torch.randn(columns, inner, device=device).bfloat16() for _ in range(copies)]
        for samples in BUCKETS:
            x = torch.randn(samples * 64, inner, device=device).bfloat16()
            out[f"{name}, {len(x)} rows"] = found = _product(config, x, several, gated=name == "gate_up")
            print(f"plans: {name}, {len(x)} rows: {_best(found)}", file=sys.stderr, flush=True)
    return out


def _product(
    config: BenchKernelsConfig, x_RI: Tensor, weights: list[Tensor], *, gated: bool
) -> dict[str, list[float]]:
    from alpamayo_dflash.kernels.product import few_rows_gated_product, few_rows_product
    from alpamayo_dflash.kernels.rows import gate

    ours = few_rows_gated_product if gated else few_rows_product

    def library(weight: Tensor) -> Tensor:
        product = functional.linear(x_RI, weight)
        return gate(product) if gated else product

    arms: dict[str, Callable[[Tensor], Tensor]] = {"library": library}
    if x_RI.shape[1] % 128 == 0:
        arms["as small rows"] = lambda weight: ours(x_RI, weight)
    for blocks in product_blocks(len(x_RI), *weights[0].shape, gated=gated):
        arms[_name(blocks)] = lambda weight, blocks=blocks: ours(x_RI, weight, blocks)  # type: ignore[misc]
    out: dict[str, list[float]] = {}
    for name, arm in arms.items():
        _timed(out, name, lambda arm=arm: [arm(weight) for weight in weights], config)  # type: ignore[misc]
    return {name: [round(ms / len(weights), 6) for ms in times] for name, times in out.items()}


def product_blocks(rows: int, columns: int, inner: int, *, gated: bool) -> Iterator[Any]:
    """Blocks that fit the shape and give between half and six times as many programs as there are SMs."""
    from alpamayo_dflash.kernels.product import Blocks

    tiles = [(64, 64, 4), (128, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 8)]
    tiles += [(32, 64, 4), (64, 128, 8)] if gated else [(128, 256, 8), (32, 64, 4)]
    wide = columns // 2 if gated else columns
    for (across, tall, warps), (deep, stages) in itertools.product(
        tiles, ((64, 4), (64, 6), (128, 3), (128, 4))
    ):
        if tall > max(64, rows) or (2 if gated else 1) * across + tall > 384 or stages * deep > 512:
            continue
        base = Blocks(swap=True, columns=across, inner=deep, stages=stages, warps=warps, rows=tall)
        for parts in (1,) if gated else (1, 2, 3, 4, 6, 8, 43):
            programs = math.ceil(wide / across) * math.ceil(rows / tall) * parts
            if inner % deep == 0 and inner // deep >= parts and 66 <= programs <= 800:
                yield replace(base, parts=parts)


def _name(plan: Any) -> str:
    return " ".join(f"{key}={value}" for key, value in asdict(plan).items())
