"""The project's kernels against the libraries', at the sizes of Alpamayo-R1's text model.

Every call is timed as a graph over several weights or layers, so that the cache holds none of them.

Shapes: R rows, N output columns, I inner dimension, P prompt entries, H heads, K KV heads, D head dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from alpamayo_dflash.bench.clocks import ceilings, fp8_ceiling, graph_ms, wall_ms
from alpamayo_dflash.bench.config import BenchKernelsConfig
from alpamayo_dflash.bench.figures import medians
from alpamayo_dflash.bench.plans import expert_shapes, layer_shapes
from alpamayo_dflash.bench.setup import gpu
from alpamayo_dflash.common.artefacts import provenance, write_json
from alpamayo_dflash.common.machine import check_device, current
from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.sampling import Chooser
from alpamayo_dflash.kernels import fp8
from alpamayo_dflash.standins.blueprint import TargetShape
from alpamayo_dflash.target.weights import padded_rows

_ENOUGH_BYTES = 400 * 2**20  # several times the largest cache of a GPU
_TAIL = 64
_OFTEN = 20
"""Calls of a graph whose start would take longer than one."""

ArmTimings = dict[str, dict[str, list[float]]]
"""By rows, then by arm: milliseconds."""


def run(config: BenchKernelsConfig) -> dict[str, Any]:
    """Measure, and write the results.

    Raises:
        ValueError: there is no GPU.
    """
    started, device = time.time(), check_device(config.device)
    if device.type != "cuda":
        raise ValueError(f"device is {config.device!r}; the kernels are timed on a GPU (cuda)")
    if config.plan_kinds:
        from alpamayo_dflash.bench import plans

        return plans.run(config, device)
    torch.manual_seed(generator_seed(config.seed))
    with torch.inference_mode(), current(device):
        raw = {
            **ceilings(config.repeats, device, torch.bfloat16),
            "products_ms": {
                name: _products(config, device, name, *shape) for name, shape in weight_shapes().items()
            },
            **fp8_ceiling(config.repeats, device),
            "fp8_products_ms": {
                name: _fp8_products(config, device, name, *shape) for name, shape in _fp8_shapes().items()
            },
            "fp8_casts_ms": _casts(config, device),
            "attention_36_layers_ms": _attention(config, device),
            "choice_ms": _choice(config, device),
        }
    found = medians(raw)
    made = provenance(config, started)
    write_json(config.out, {"medians": found, "raw": raw, "gpu": gpu(device), "provenance": made})
    return {"medians": found, "out": str(config.out)}


def weight_shapes() -> dict[str, tuple[int, int]]:
    """[N, I] of a layer's fused weights and of the padded head."""
    shape = TargetShape()
    head = {"head": (padded_rows(shape.vocab_size), shape.hidden)}
    return layer_shapes(shape.hidden, shape.heads, shape.mlp) | head


def _products(
    config: BenchKernelsConfig, device: torch.device, name: str, columns: int, inner: int
) -> ArmTimings:
    """One product, by the kernel and by cuBLAS; of gate and up the kernel's is with the gate applied."""
    from alpamayo_dflash.kernels.product import few_rows_gated_product, few_rows_product

    copies = math.ceil(_ENOUGH_BYTES / (2 * columns * inner))
    weights = [torch.randn(columns, inner, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    ours = few_rows_gated_product if name == "gate_up" else few_rows_product
    arms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"project": ours, "cublas": functional.linear}
    if name == "head":
        odd = TargetShape().vocab_size
        arms["cublas, not padded"] = lambda x, weight: functional.linear(x, weight[:odd])
    out: ArmTimings = {}
    for rows in config.row_counts:
        x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)

        def every(arm: Callable[[Tensor, Tensor], Tensor], x: Tensor = x) -> None:
            for weight in weights:
                arm(x, weight)

        out[str(rows)] = {
            label: _each(graph_ms(lambda arm=arm: every(arm), config.repeats, device), copies)  # type: ignore[misc]
            for label, arm in arms.items()
        }
    return out


def _fp8_shapes() -> dict[str, tuple[int, int]]:
    """[N, I] of what can be in FP8: the text model's layers, and the expert's."""
    text = {name: shape for name, shape in weight_shapes().items() if name != "head"}
    return text | {f"expert {name}": shape for name, shape in expert_shapes().items()}


def _fp8_products(
    config: BenchKernelsConfig, device: torch.device, name: str, columns: int, inner: int
) -> ArmTimings:
    """One product of e4m3 by e4m3, by the kernel (of gate and up gated) and by the library."""
    from alpamayo_dflash.kernels.fp8_fused import product
    from alpamayo_dflash.kernels.fp8_product import few_rows_gated_product, few_rows_product

    copies = math.ceil(_ENOUGH_BYTES / (columns * inner))
    weights = [fp8.cast_rows(torch.randn(columns, inner, device=device)) for _ in range(copies)]
    ours = few_rows_gated_product if name.endswith("gate_up") else few_rows_product
    out: ArmTimings = {}
    for rows in config.row_counts:
        x = fp8.cast_rows(torch.randn(rows, inner, device=device))
        out[str(rows)] = {
            label: _each(graph_ms(partial(_every, arm, x, weights), config.repeats, device), copies)
            for label, arm in (("project", ours), ("cublaslt", product))
        }
    return out


def _every(
    arm: Callable[..., Tensor], x: tuple[Tensor, Tensor], weights: list[tuple[Tensor, Tensor]]
) -> None:
    for weight in weights:
        arm(*x, *weight, torch.bfloat16)


def _often(call: Callable[[], object]) -> None:
    for _ in range(_OFTEN):
        call()


def _gate_and_cast(both_RN: Tensor) -> tuple[Tensor, Tensor]:
    from alpamayo_dflash.kernels.rows import gate

    return fp8.cast_rows(gate(both_RN))


def _casts(config: BenchKernelsConfig, device: torch.device) -> ArmTimings:
    """Rows of a gated MLP cast to e4m3, alone and with the gate, by the kernels and by plain operations."""
    from alpamayo_dflash.kernels.fp8_triton import cast_gated, cast_rows

    out: ArmTimings = {}
    for rows in (*config.row_counts, config.prompt):
        both = torch.randn(rows, 2 * TargetShape().mlp, device=device, dtype=torch.bfloat16)
        half = both[:, : TargetShape().mlp].contiguous()
        arms: dict[str, Callable[[], object]] = {
            "project": partial(cast_rows, half),
            "project, gated": partial(cast_gated, both),
            "plain": partial(fp8.cast_rows, half),
            "plain, gated": partial(_gate_and_cast, both),
        }
        out[str(rows)] = {
            label: _each(graph_ms(partial(_often, arm), config.repeats, device), _OFTEN)
            for label, arm in arms.items()
        }
    return out


def _attention(config: BenchKernelsConfig, device: torch.device) -> ArmTimings:
    """All layers' attention of rows over a prompt and a tail, by the kernel and by PyTorch's."""
    from alpamayo_dflash.kernels.attention import attend

    shape, prompt = TargetShape(), config.prompt
    entries = prompt + max(_TAIL, *config.row_counts)
    cache = torch.randn(
        2, shape.layers, entries, shape.kv_heads, shape.head_dim, device=device, dtype=torch.bfloat16
    )
    length = torch.tensor([prompt], device=device)
    out: ArmTimings = {}
    for rows in config.row_counts:
        q = torch.randn(rows, shape.heads, shape.head_dim, device=device, dtype=torch.bfloat16)
        slots = max(_TAIL, rows)
        seen = torch.ones(rows, slots, device=device).tril()
        mask = torch.cat((torch.ones(rows, prompt, device=device), seen), dim=1).bool()
        tail = seen.to(torch.uint8)

        def project(layer: int, q: Tensor = q, tail: Tensor = tail) -> None:
            attend(q, cache[0, layer], cache[1, layer], length, tail)

        def flash(layer: int, q: Tensor = q) -> None:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                _sdpa(q, cache[0, layer, :prompt], cache[1, layer, :prompt], None)

        def masked(layer: int, q: Tensor = q, mask: Tensor = mask) -> None:
            end = mask.shape[1]
            _sdpa(q, cache[0, layer, :end], cache[1, layer, :end], mask)

        arms = {
            "project": project,
            "flash, prompt part alone": flash,
            "masked, prompt and tail": masked,
        }
        out[str(rows)] = {
            label: graph_ms(
                lambda arm=arm: [arm(layer) for layer in range(shape.layers)],  # type: ignore[misc]
                config.repeats,
                device,
            )
            for label, arm in arms.items()
        }
    return out


def _sdpa(q_RHD: Tensor, keys_PKD: Tensor, values_PKD: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (q_RHD, keys_PKD, values_PKD))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _choice(config: BenchKernelsConfig, device: torch.device) -> ArmTimings:
    """Noise, nucleus and arg max over the vocabulary, by the kernels and by a sort."""
    shape = TargetShape()
    out: ArmTimings = {}
    for rows in config.row_counts:
        logits = 3 * torch.randn(rows, padded_rows(shape.vocab_size), device=device, dtype=torch.bfloat16)
        keys = torch.randint(0, 2**32, (rows, 2), device=device)
        places = torch.arange(rows, device=device)
        out[str(rows)] = {}
        for label, kernels in (("project", True), ("sort, uncaptured", False)):
            choose = Chooser(
                rows,
                shape.vocab_size,
                masked=range(shape.traj_start, shape.special_start),
                token_ids=None,
                sampling=Sampling(),
                device=device,
                kernels=kernels,
            )
            call = lambda c=choose, x=logits, k=keys, p=places: c(x, k, p)  # noqa: E731
            # The sort looks at the device to see whether it is needed, which no graph can.
            clock = graph_ms if kernels else wall_ms
            out[str(rows)][label] = clock(call, config.repeats, device)
    return out


def _each(times: list[float], count: int) -> list[float]:
    return [round(ms / count, 6) for ms in times]
