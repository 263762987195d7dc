"""Products of a few rows with a large weight, both in e4m3, which take as long as reading the weight.

The library takes half as long again at few rows (docs/log.md), so these are ours. As in `kernels.product` a
program takes some output columns and a part of the inner dimension, and parts are summed in a fixed order by
the kernel that reads the result. Tiles and parts depend on the weight alone, so that a row's values are the
same at any number of rows.

Shapes: R rows, N output columns, I inner dimension, J parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpamayo_dflash.kernels.limits import fitting_stages, shared_memory


@triton.jit(do_not_specialize=["rows"])
def fp8_product_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    out_ptr,
    rows,
    columns,
    inner,
    parts,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[j, r, n] = scale[r] · scale[n] · sum over part j of x[r, k] · weight[n, k].

    The weight's tile is the left operand, which puts the few rows on the tensor core's narrow side. Sums are
    the tensor core's own, of fewer bits than float32 (its fast accumulation, as the library's is used).
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    # Whole blocks, dealt out evenly over the parts.
    blocks = inner // BLOCK_K
    start = part * blocks // parts * BLOCK_K
    stop = (part + 1) * blocks // parts * BLOCK_K
    real, there = r < rows, n < columns
    weight_rows = weight_ptr + tl.where(there, n, 0).to(tl.int64) * inner
    x_rows = x_ptr + tl.where(real, r, 0).to(tl.int64) * inner
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for offset in range(start, stop, BLOCK_K):
        at = offset + k
        x = tl.load(x_rows[None, :] + at[:, None])
        weight = tl.load(weight_rows[:, None] + at[None, :])
        total = tl.dot(weight, x, total)
    x_scales = tl.load(x_scales_ptr + r, mask=real, other=0.0)
    weight_scales = tl.load(weight_scales_ptr + n, mask=there, other=0.0)
    total = total * x_scales[None, :] * weight_scales[:, None]
    at = part.to(tl.int64) * rows * columns + r[None, :].to(tl.int64) * columns + n[:, None]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=real[None, :] & there[:, None])


FEW_ROWS = 64
"""Up to so many rows the kernel is faster than the library (docs/results/fp8_plans_h200.json)."""
_FULL = 96  # programs; at that many the multiprocessors of an H100 or H200 read as fast as they can


@dataclass(frozen=True)
class Tile:
    """A program's tile of the weight, and the stages of its loads."""

    columns: int
    inner: int
    stages: int


_TALL = Tile(columns=128, inner=128, stages=4)
_TILES = (Tile(columns=64, inner=128, stages=9), Tile(columns=64, inner=64, stages=12))
_MANY_COLUMNS = 128 * _FULL


def fits(inner: int) -> bool:
    """Whether the kernel takes a weight of this inner dimension."""
    return inner % _TILES[-1].inner == 0


def plan(columns: int, inner: int) -> tuple[Tile, int]:
    """The tile and the parts of a weight's shape."""
    if columns >= _MANY_COLUMNS and inner % _TALL.inner == 0:
        return _TALL, 1
    tile = next(tile for tile in _TILES if inner % tile.inner == 0)
    parts = 1
    while triton.cdiv(columns, tile.columns) * parts < _FULL and inner >= 16 * parts * tile.inner:
        parts *= 2
    return tile, parts


def few_rows_product(
    x_RI: Tensor, x_scales_R1: Tensor, weight_NI: Tensor, weight_scales_N1: Tensor, dtype: torch.dtype
) -> Tensor:
    """X @ weight.T, scaled, as parts [J, R, N] that are still to be summed: float32, or `dtype` where J is 1.

    Args:
        x_RI: e4m3.
        x_scales_R1: float32.
        weight_NI: e4m3; `fits` its inner dimension.
        weight_scales_N1: float32.
        dtype: of a result in one part.
    """
    (rows, inner), columns = x_RI.shape, len(weight_NI)
    assert fits(inner) and x_RI.is_contiguous() and weight_NI.is_contiguous()
    tile, parts = plan(columns, inner)
    out = torch.empty(parts, rows, columns, dtype=dtype if parts == 1 else torch.float32, device=x_RI.device)
    block_rows = min(FEW_ROWS, max(16, triton.next_power_of_2(rows)))
    stage_bytes = tile.inner * (tile.columns + block_rows)
    fp8_product_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(columns, tile.columns), parts)](
        x_RI,
        x_scales_R1,
        weight_NI,
        weight_scales_N1,
        out,
        rows,
        columns,
        inner,
        parts,
        BLOCK_R=block_rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.inner,
        num_stages=max(1, fitting_stages(tile.stages, stage_bytes, 0, shared_memory(x_RI.device))),
        num_warps=4,
    )
    return out
