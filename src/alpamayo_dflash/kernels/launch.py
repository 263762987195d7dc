"""The kernels as functions of tensors: what block sizes to take, and when cuBLAS is better.

The numbers come from `bench-kernels` (docs/results). Every function is the fast form of plain
operations: linear layers, `rms_norm` and `rotate` of `target/layers.py`, PyTorch's attention.

Shapes: R rows, N output columns, I inner dimension, J parts, C hidden, H query heads, K KV heads, D head dim,
E cache entries, T tail slots.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.runtime import driver

from alpamayo_dflash.kernels.attention import merge_kernel, stretches_kernel
from alpamayo_dflash.kernels.product import product_kernel
from alpamayo_dflash.kernels.rows import add_norm_kernel, gate_kernel, rotate_store_kernel

# Up to 32 rows our products read a layer's weights faster than cuBLAS does, up to here about as fast
# (docs/log.md, 2026-11-25), and beyond it not.
FEW_ROWS = 64
_LOG2_E = 1.4426950408889634
# Programs that fill the 132 multiprocessors of an H100 or H200 about once.
_FULL = 128
_INNER_BLOCK = 128
_LEAST_TILE = 16


@dataclass(frozen=True)
class _Blocks:
    """A product kernel's shape; `swap` as in the kernel."""

    swap: bool
    columns: int
    inner: int
    stages: int
    warps: int

    def staged(self, rows: int, gated: bool, available: int) -> int:
        """The stages that fit so much shared memory, at so many rows a program."""
        stage_bytes = 2 * self.inner * (rows + self.columns * (2 if gated else 1))
        return max(1, fitting_stages(self.stages, stage_bytes, 0, available))


_NARROW = _Blocks(swap=True, columns=64, inner=128, stages=5, warps=4)
_NARROW_GATED = _Blocks(swap=False, columns=32, inner=128, stages=3, warps=4)
_WIDE_GATED = _Blocks(swap=True, columns=64, inner=64, stages=4, warps=4)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; unbounded in Triton's interpreter."""
    if device.type != "cuda":
        return 2**31
    properties = driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def fitting_stages(wanted: int, stage_bytes: int, fixed_bytes: int, available: int) -> int:
    """How many stages of a loop's loads fit into shared memory, up to those wanted; 0 if not even one."""
    return max(0, min(wanted, (available - fixed_bytes) // stage_bytes))


def product(x_RI: Tensor, weight_NI: Tensor) -> Tensor:
    """X @ weight.T as parts [J, R, N] that are still to be summed; J is 1 where one program takes all."""
    if not _ours(x_RI):
        return functional.linear(x_RI, weight_NI).unsqueeze(0)
    return few_rows_product(x_RI, weight_NI)


def few_rows_product(x_RI: Tensor, weight_NI: Tensor) -> Tensor:
    """`product` by the kernel, at any number of rows."""
    rows, inner = x_RI.shape
    columns = len(weight_NI)
    tiles, parts = triton.cdiv(columns, _NARROW.columns), 1
    while tiles * parts < _FULL and inner % (2 * parts * _INNER_BLOCK) == 0:
        parts *= 2
    dtype = x_RI.dtype if parts == 1 else torch.float32
    out = torch.empty(parts, rows, columns, dtype=dtype, device=x_RI.device)
    _launch(x_RI, weight_NI, out, _NARROW, gated=False)
    return out


def _ours(x_RI: Tensor) -> bool:
    """Whether the kernel is for these rows."""
    rows, inner = x_RI.shape
    return rows <= FEW_ROWS and inner % _INNER_BLOCK == 0


def whole_product(x_RI: Tensor, weight_NI: Tensor) -> Tensor:
    """X @ weight.T, [R, N]."""
    parts = product(x_RI, weight_NI)
    return parts[0] if len(parts) == 1 else parts.sum(0).to(x_RI.dtype)


def gated_product(x_RI: Tensor, weight_NI: Tensor) -> Tensor:
    """silu(x @ gate.T) · (x @ up.T), [R, N/2], of a weight that holds gate's rows, then up's."""
    if not _ours(x_RI):
        return gate(functional.linear(x_RI, weight_NI))
    return few_rows_gated_product(x_RI, weight_NI)


def few_rows_gated_product(x_RI: Tensor, weight_NI: Tensor) -> Tensor:
    """`gated_product` by the kernel, at any number of rows."""
    rows = len(x_RI)
    out = torch.empty(1, rows, len(weight_NI) // 2, dtype=x_RI.dtype, device=x_RI.device)
    _launch(x_RI, weight_NI, out, _NARROW_GATED if rows <= 16 else _WIDE_GATED, gated=True)
    return out[0]


def gate(both_RN: Tensor) -> Tensor:
    """silu(gate) · up, [R, N/2], of [R, N] that holds gate, then up."""
    rows, width = len(both_RN), both_RN.shape[1] // 2
    out = torch.empty(rows, width, dtype=both_RN.dtype, device=both_RN.device)
    block = 1024
    gate_kernel[(rows, triton.cdiv(width, block))](both_RN, out, width, BLOCK_C=block, num_warps=4)
    return out


def _launch(x_RI: Tensor, weight_NI: Tensor, out_JRN: Tensor, blocks: _Blocks, *, gated: bool) -> None:
    parts, rows, columns = out_JRN.shape
    inner = x_RI.shape[1]
    assert x_RI.stride(1) == 1 and weight_NI.is_contiguous()
    block_rows = min(FEW_ROWS, max(16, triton.next_power_of_2(rows)))
    product_kernel[(triton.cdiv(columns, blocks.columns), parts, triton.cdiv(rows, block_rows))](
        x_RI,
        weight_NI,
        out_JRN,
        rows,
        columns,
        inner,
        x_RI.stride(0),
        inner // parts,
        GATED=gated,
        SWAP=blocks.swap,
        BLOCK_R=block_rows,
        BLOCK_N=blocks.columns,
        BLOCK_K=blocks.inner,
        num_stages=blocks.staged(block_rows, gated, shared_memory(x_RI.device)),
        num_warps=blocks.warps,
    )


def add_norm(
    hidden_RC: Tensor | None,
    parts_JRC: Tensor | None,
    weight_C: Tensor,
    eps: float,
    normed_RC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden + the parts' sum, and its RMS norm.

    Args:
        hidden_RC: the residual, or None.
        parts_JRC: from `product`, or None; one of the two is there.
        weight_C: of the norm.
        eps: of the norm.
        normed_RC: where to write the norm; a new tensor by default.

    Returns:
        The sum [R, C] (hidden itself without parts; meaningless without hidden) and the norm [R, C].
    """
    like = hidden_RC if hidden_RC is not None else parts_JRC
    assert like is not None
    rows, width = like.shape[-2:]
    normed = like.new_empty(rows, width, dtype=weight_C.dtype) if normed_RC is None else normed_RC
    residual = hidden_RC is not None and parts_JRC is not None
    total = torch.empty_like(hidden_RC) if residual and hidden_RC is not None else like
    add_norm_kernel[(rows,)](
        like if hidden_RC is None else hidden_RC,
        like if parts_JRC is None else parts_JRC,
        weight_C,
        total,
        normed,
        rows,
        width,
        eps,
        RESIDUAL=hidden_RC is not None,
        PARTS=0 if parts_JRC is None else len(parts_JRC),
        BLOCK_C=triton.next_power_of_2(width),
        num_warps=8,
    )
    return total, normed


def rotate_store(
    parts_JRN: Tensor,
    norms: tuple[Tensor, Tensor],
    eps: float,
    rotary: tuple[Tensor, Tensor],
    keys_EKD: Tensor,
    values_EKD: Tensor,
    entries_R: Tensor,
) -> Tensor:
    """Norm and rotate queries and keys, write keys and values to the cache.

    Args:
        parts_JRN: the fused product of q, k and v, N = (H + 2K)·D.
        norms: q's and k's weights [D].
        eps: of both.
        rotary: cos and sin [R, D].
        keys_EKD: the cache's keys of one layer.
        values_EKD: its values.
        entries_R: int64, where each row's go.

    Returns:
        q [R, H, D].
    """
    count, rows, width = parts_JRN.shape
    kv_heads, dim = keys_EKD.shape[1:]
    heads = width // dim - 2 * kv_heads
    q = torch.empty(rows, heads, dim, dtype=keys_EKD.dtype, device=keys_EKD.device)
    block = math.gcd(8, kv_heads)  # q's, k's and v's heads never share a program
    rotate_store_kernel[(rows, (heads + 2 * kv_heads) // block)](
        parts_JRN,
        *norms,
        *rotary,
        q,
        keys_EKD,
        values_EKD,
        entries_R,
        rows,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=dim // 2,
        PARTS=count,
        BLOCK_H=block,
        num_warps=4,
    )
    return q


@dataclass(frozen=True)
class _Plan:
    """How attention is cut: rows and keys of a tile, the prompt's stretches, a tail stretch's slots."""

    rows: int
    keys: int
    stretches: int
    warps: int
    stages: int
    tail: int = 128

    def fitted(self, dim: int, available: int) -> _Plan:
        """The plan with as many keys and stages as fit so much shared memory."""
        plan = self
        while True:
            stages = fitting_stages(plan.stages, 4 * plan.keys * dim, 2 * plan.rows * dim, available)
            if stages >= 2 or (plan.keys <= _LEAST_TILE and plan.rows <= _LEAST_TILE):
                return replace(plan, stages=max(stages, 1))
            if plan.keys > _LEAST_TILE:
                plan = replace(plan, keys=plan.keys // 2)
            else:
                plan = replace(plan, rows=plan.rows // 2)


_PLANS = {
    16: _Plan(16, 32, 32, 4, 3),
    64: _Plan(64, 64, 12, 4, 3),
    192: _Plan(64, 64, 8, 4, 3),
    256: _Plan(128, 64, 6, 8, 3),
    512: _Plan(128, 64, 4, 8, 3),
    1024: _Plan(128, 128, 1, 8, 3, tail=256),
}
"""By the most folded rows (rows times query heads of a KV head) that a plan is for; the last for all more."""


def _plan(folded: int) -> _Plan:
    return next((plan for most, plan in _PLANS.items() if folded <= most), _PLANS[max(_PLANS)])


def attend(
    q_RHD: Tensor,
    keys_EKD: Tensor,
    values_EKD: Tensor,
    length_1: Tensor,
    mask_RT: Tensor,
    *,
    prompt: bool = True,
) -> Tensor:
    """Attention of rows over a prompt and a tail behind it in the cache.

    Args:
        q_RHD: rotated queries.
        keys_EKD: the prompt's entries, then the tail's.
        values_EKD: likewise.
        length_1: int64 [1] on the device, the prompt's entries.
        mask_RT: uint8, 1 where a row sees a slot of the tail. Every row must see something.
        prompt: whether there may be a prompt; without, `length_1` is 0.

    Returns:
        [R, H·D].
    """
    rows, heads, dim = q_RHD.shape
    kv_heads = keys_EKD.shape[1]
    plan = _plan(rows * (heads // kv_heads)).fitted(dim, shared_memory(q_RHD.device))
    tiles = triton.cdiv(rows * (heads // kv_heads), plan.rows)
    stretches = plan.stretches if prompt else 0
    tail = triton.cdiv(mask_RT.shape[1], plan.tail)
    count = stretches + tail
    out = torch.empty(count, rows, heads, dim, dtype=torch.float32, device=q_RHD.device)
    tops = torch.empty(2, count, rows, heads, dtype=torch.float32, device=q_RHD.device)
    merged = torch.empty(rows, heads * dim, dtype=q_RHD.dtype, device=q_RHD.device)
    stretches_kernel[(kv_heads, count, tiles)](
        q_RHD,
        keys_EKD,
        values_EKD,
        length_1,
        mask_RT,
        out,
        tops[0],
        tops[1],
        rows,
        mask_RT.shape[1],
        dim**-0.5 * _LOG2_E,
        stretches,
        plan.tail,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK_M=plan.rows,
        BLOCK_T=plan.keys,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    merge_kernel[(rows, heads)](
        out,
        tops[0],
        tops[1],
        merged,
        rows,
        count,
        HEADS=heads,
        DIM=dim,
        BLOCK_J=triton.next_power_of_2(count),
        num_warps=4,
    )
    return merged
