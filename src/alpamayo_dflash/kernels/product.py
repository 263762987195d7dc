"""Products of a few rows with a large weight, which take as long as reading the weight.

cuBLAS leaves a tenth of the time of a pass on the table here (docs/log.md, 2026-11-24), so these are ours. A
program takes some of the weight's rows (output columns) and a part of the inner dimension; parts are summed
in a fixed order by the kernel that reads the result, so that a row's values depend on nothing but that row.

Shapes: R rows, N output columns, I inner dimension, J parts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    columns,
    inner,
    x_stride,
    part_inner,
    GATED: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[j, r, n] = sum over part j of x[r, k] · weight[n, k].

    GATED: the weight holds gate rows and then up rows, and out[0, r, n] = silu(gate) · up.
    SWAP: the weight's tile is the left operand, which puts the few rows on the tensor core's narrow side.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    start = part * part_inner
    n_read = tl.where(n < columns, n, 0)
    weight_rows = weight_ptr + n_read.to(tl.int64) * inner + start
    up_rows = weight_rows + columns.to(tl.int64) * inner
    x_rows = x_ptr + r.to(tl.int64) * x_stride + start
    real = r < rows
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        total_up = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        total_up = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for offset in range(0, part_inner, BLOCK_K):
        at = offset + k
        if SWAP:
            x = tl.load(x_rows[None, :] + at[:, None], mask=real[None, :], other=0.0)
            weight = tl.load(weight_rows[:, None] + at[None, :])
            total = tl.dot(weight, x, total)
            if GATED:
                total_up = tl.dot(tl.load(up_rows[:, None] + at[None, :]), x, total_up)
        else:
            x = tl.load(x_rows[:, None] + at[None, :], mask=real[:, None], other=0.0)
            weight = tl.load(weight_rows[None, :] + at[:, None])
            total = tl.dot(x, weight, total)
            if GATED:
                total_up = tl.dot(x, tl.load(up_rows[None, :] + at[:, None]), total_up)
    if GATED:
        # Rounded where separate operations would round.
        gate = total.to(x_ptr.dtype.element_ty).to(tl.float32)
        up = total_up.to(x_ptr.dtype.element_ty).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(x_ptr.dtype.element_ty).to(tl.float32)
        total = silu * up
    base = part.to(tl.int64) * rows * columns
    if SWAP:
        at = base + r[None, :].to(tl.int64) * columns + n[:, None]
        tl.store(
            out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=real[None, :] & (n < columns)[:, None]
        )
    else:
        at = base + r[:, None].to(tl.int64) * columns + n[None, :]
        tl.store(
            out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=real[:, None] & (n < columns)[None, :]
        )
