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
    GATED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[j, r, n] = scale[r] · scale[n] · sum over part j of x[r, k] · weight[n, k].

    GATED: the weight holds gate's rows and then up's, and out[0, r, n] = silu(gate) · up, rounded where
    separate operations would round.

    The weight's tile is the left operand, which puts the few rows on the tensor core's narrow side. Sums are
    the tensor core's own, of fewer bits than float32 (its fast accumulation, as the library's is used). Rows
    that are not there are not read: reading the first in their place made every program wait for its lines.
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
    up_rows = weight_rows + columns.to(tl.int64) * inner
    x_rows = x_ptr + r.to(tl.int64) * inner
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    total_up = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for offset in range(start, stop, BLOCK_K):
        at = offset + k
        x = tl.load(x_rows[None, :] + at[:, None], mask=real[None, :], other=0.0)
        total = tl.dot(tl.load(weight_rows[:, None] + at[None, :]), x, total)
        if GATED:
            total_up = tl.dot(tl.load(up_rows[:, None] + at[None, :]), x, total_up)
    dtype = out_ptr.dtype.element_ty
    x_scales = tl.load(x_scales_ptr + r, mask=real, other=0.0)
    total = total * x_scales[None, :] * tl.load(weight_scales_ptr + n, mask=there, other=0.0)[:, None]
    if GATED:
        up_scales = tl.load(weight_scales_ptr + columns + n, mask=there, other=0.0)
        up = (total_up * x_scales[None, :] * up_scales[:, None]).to(dtype).to(tl.float32)
        gate = total.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        total = silu * up
    at = part.to(tl.int64) * rows * columns + r[None, :].to(tl.int64) * columns + n[:, None]
    tl.store(out_ptr + at, total.to(dtype), mask=real[None, :] & there[:, None])


FEW_ROWS = 64
"""Up to so many rows the kernel is faster than the library (docs/results/fp8_plans_h200.json)."""
_FULL = 96  # programs; at that many the multiprocessors of an H100 or H200 read as fast as they can


@dataclass(frozen=True)
class Tile:
    """A program's tile of the weight, and the stages of its loads.

    Attributes:
        columns: of the result.
        inner: of the inner dimension.
        stages: at most.
        warps: of a program.
        parts: of the inner dimension; None for as many as fill the card.
    """

    columns: int
    inner: int
    stages: int
    warps: int = 4
    parts: int | None = None


_TALL = Tile(columns=128, inner=128, stages=4)
_TILES = (Tile(columns=64, inner=128, stages=9), Tile(columns=64, inner=64, stages=12))
_GATED = (Tile(columns=64, inner=128, stages=4), Tile(columns=64, inner=64, stages=6))
_MANY_COLUMNS = 128 * _FULL
TUNED = {(16512, 2048, True): Tile(columns=64, inner=128, stages=6)}
"""By columns of the weight, inner dimension and whether gated (docs/results/fp8_tries_h200.json)."""


def fits(inner: int) -> bool:
    """Whether the kernel takes a weight of this inner dimension."""
    return inner % _TILES[-1].inner == 0


def plan(columns: int, inner: int, *, gated: bool = False) -> tuple[Tile, int]:
    """The tile and the parts of a weight's shape.

    Args:
        columns: of the weight, of gate and up together.
        inner: its inner dimension.
        gated: whether the result is silu(gate) · up, which takes one part.
    """
    tile = TUNED.get((columns, inner, gated))
    if tile is None and not gated and columns >= _MANY_COLUMNS and inner % _TALL.inner == 0:
        return _TALL, 1
    if tile is None:
        tile = next(tile for tile in (_GATED if gated else _TILES) if inner % tile.inner == 0)
    if gated or tile.parts is not None:
        return tile, tile.parts or 1
    parts = 1
    while triton.cdiv(columns, tile.columns) * parts < _FULL and inner >= 8 * parts * tile.inner:
        parts *= 2
    return tile, parts


def few_rows_product(
    x_RI: Tensor,
    x_scales_R1: Tensor,
    weight_NI: Tensor,
    weight_scales_N1: Tensor,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """X @ weight.T, scaled, as parts [J, R, N] that are still to be summed: float32, or `dtype` where J is 1.

    Args:
        x_RI: e4m3.
        x_scales_R1: float32.
        weight_NI: e4m3; `fits` its inner dimension.
        weight_scales_N1: float32.
        dtype: of a result in one part.
        tile: of the weight; by default what `plan` says, which a benchmark tries others against.
    """
    columns, inner = weight_NI.shape
    found, parts = plan(columns, inner) if tile is None else (tile, tile.parts or 1)
    out_dtype = dtype if parts == 1 else torch.float32
    out = torch.empty(parts, len(x_RI), columns, dtype=out_dtype, device=x_RI.device)
    _launch(x_RI, x_scales_R1, weight_NI, weight_scales_N1, out, found, gated=False)
    return out


def few_rows_gated_product(
    x_RI: Tensor,
    x_scales_R1: Tensor,
    weight_NI: Tensor,
    weight_scales_N1: Tensor,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """silu(x @ gate.T) · (x @ up.T), scaled, [R, N/2] in `dtype`, of a weight with gate's rows, then up's."""
    columns, inner = weight_NI.shape
    out = torch.empty(1, len(x_RI), columns // 2, dtype=dtype, device=x_RI.device)
    found = tile or plan(columns, inner, gated=True)[0]
    _launch(x_RI, x_scales_R1, weight_NI, weight_scales_N1, out, found, gated=True)
    return out[0]


def _launch(
    x_RI: Tensor,
    x_scales_R1: Tensor,
    weight_NI: Tensor,
    weight_scales_N1: Tensor,
    out_JRN: Tensor,
    tile: Tile,
    *,
    gated: bool,
) -> None:
    (parts, rows, columns), inner = out_JRN.shape, x_RI.shape[1]
    assert inner % tile.inner == 0 and x_RI.is_contiguous() and weight_NI.is_contiguous()
    block_rows = min(FEW_ROWS, max(16, triton.next_power_of_2(rows)))
    stage_bytes = tile.inner * (tile.columns * (2 if gated else 1) + block_rows)
    fp8_product_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(columns, tile.columns), parts)](
        x_RI,
        x_scales_R1,
        weight_NI,
        weight_scales_N1,
        out_JRN,
        rows,
        columns,
        inner,
        parts,
        GATED=gated,
        BLOCK_R=block_rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.inner,
        num_stages=max(1, fitting_stages(tile.stages, stage_bytes, 0, shared_memory(x_RI.device))),
        num_warps=tile.warps,
    )
