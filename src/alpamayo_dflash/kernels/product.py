"""Products of a few rows with a large weight, which take as long as reading the weight.

cuBLAS leaves a tenth of the time of a pass on the table here (docs/log.md, 2026-11-24), so these are ours. A
program takes some of the weight's rows (output columns) and a part of the inner dimension; parts are summed
in a fixed order by the kernel that reads the result, so that a row's values depend on nothing but that row.

Shapes: R rows, N output columns, I inner dimension, J parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from alpamayo_dflash.kernels.limits import fitting_stages, shared_memory
from alpamayo_dflash.kernels.rows import gate


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    columns,
    inner,
    x_stride,
    parts,
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
    # Row tiles that read the same weights run together, so that these come from the memory once.
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    # Whole blocks, dealt out evenly over the parts.
    blocks = inner // BLOCK_K
    start = part * blocks // parts * BLOCK_K
    stop = (part + 1) * blocks // parts * BLOCK_K
    n_read = tl.where(n < columns, n, 0)
    weight_rows = weight_ptr + n_read.to(tl.int64) * inner
    up_rows = weight_rows + columns.to(tl.int64) * inner
    x_rows = x_ptr + r.to(tl.int64) * x_stride
    real = r < rows
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        total_up = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        total_up = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for offset in range(start, stop, BLOCK_K):
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


# Up to 32 rows our products read a layer's weights faster than cuBLAS does, up to here about as fast
# (docs/log.md, 2026-11-25), and beyond it not.
FEW_ROWS = 64
# Programs that fill the 132 multiprocessors of an H100 or H200 about once.
_FULL = 128
_INNER_BLOCK = 128


@dataclass(frozen=True)
class Blocks:
    """A product kernel's shape; `swap` as in the kernel.

    Attributes:
        columns: of a tile.
        inner: of a tile.
        stages: of its loads.
        warps: of a program.
        rows: of a tile, a power of two; None for as many as there are, up to FEW_ROWS.
        parts: of the inner dimension, whose sum is the product; None for as many as fill the card.
    """

    swap: bool
    columns: int
    inner: int
    stages: int
    warps: int
    rows: int | None = None
    parts: int | None = None

    def staged(self, rows: int, gated: bool, available: int, element_bytes: int = 2) -> int:
        """The stages that fit so much shared memory, at so many rows a program."""
        stage_bytes = element_bytes * self.inner * (rows + self.columns * (2 if gated else 1))
        return max(1, fitting_stages(self.stages, stage_bytes, 0, available))


_NARROW = Blocks(swap=True, columns=64, inner=128, stages=5, warps=4)
_NARROW_GATED = Blocks(swap=False, columns=32, inner=128, stages=3, warps=4)
_WIDE_GATED = Blocks(swap=True, columns=64, inner=64, stages=4, warps=4)


_SPLIT = Blocks(swap=True, columns=64, inner=64, stages=6, warps=4, rows=64, parts=4)
_SPLIT_DEEP = Blocks(swap=True, columns=64, inner=64, stages=8, warps=4, rows=64, parts=4)
# The widths of R1's action expert, on one H200 (docs/results/expert_plans_h200.json).
TUNED: dict[tuple[int, int, bool], dict[int, Blocks | None]] = {
    (4096, 2048, False): {1024: None},
    (2048, 2048, False): {128: _SPLIT, 1024: None},
    (16512, 2048, True): {
        64: Blocks(swap=True, columns=64, inner=128, stages=4, warps=4, rows=64, parts=1),
        128: Blocks(swap=True, columns=64, inner=64, stages=6, warps=4, rows=128, parts=1),
        1024: None,
    },
    (2048, 8256, False): {128: _SPLIT_DEEP, 1024: None},
}
"""By columns, inner dimension and whether gated: by the most rows, the blocks, or None for the library."""


def tuned(rows: int, columns: int, inner: int, gated: bool) -> tuple[bool, Blocks | None]:
    """Whether a product of this shape was tuned, and what was found best."""
    found = TUNED.get((columns, inner, gated), {})
    most = next((most for most in found if rows <= most), None)
    return (True, found[most]) if most is not None else (False, None)


def product(x_RI: Tensor, weight_NI: Tensor) -> Tensor:
    """X @ weight.T as parts [J, R, N] that are still to be summed; J is 1 where one program takes all."""
    known, blocks = tuned(len(x_RI), *weight_NI.shape, gated=False)
    if blocks is None and (known or not _ours(x_RI)):
        return functional.linear(x_RI, weight_NI).unsqueeze(0)
    return few_rows_product(x_RI, weight_NI, blocks)


def few_rows_product(x_RI: Tensor, weight_NI: Tensor, blocks: Blocks | None = None) -> Tensor:
    """`product` by the kernel, at any number of rows."""
    rows, inner = x_RI.shape
    columns, blocks = len(weight_NI), blocks or _NARROW
    tiles, parts = triton.cdiv(columns, blocks.columns), blocks.parts or 1
    if blocks.parts is None:
        while tiles * parts < _FULL and inner % (2 * parts * _INNER_BLOCK) == 0:
            parts *= 2
    dtype = x_RI.dtype if parts == 1 else torch.float32
    out = torch.empty(parts, rows, columns, dtype=dtype, device=x_RI.device)
    _launch(x_RI, weight_NI, out, blocks, gated=False)
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
    known, blocks = tuned(len(x_RI), *weight_NI.shape, gated=True)
    if blocks is None and (known or not _ours(x_RI)):
        return gate(functional.linear(x_RI, weight_NI))
    return few_rows_gated_product(x_RI, weight_NI, blocks)


def few_rows_gated_product(x_RI: Tensor, weight_NI: Tensor, blocks: Blocks | None = None) -> Tensor:
    """`gated_product` by the kernel, at any number of rows."""
    rows = len(x_RI)
    out = torch.empty(1, rows, len(weight_NI) // 2, dtype=x_RI.dtype, device=x_RI.device)
    blocks = blocks or (_NARROW_GATED if rows <= 16 else _WIDE_GATED)
    _launch(x_RI, weight_NI, out, blocks, gated=True)
    return out[0]


def _launch(x_RI: Tensor, weight_NI: Tensor, out_JRN: Tensor, blocks: Blocks, *, gated: bool) -> None:
    parts, rows, columns = out_JRN.shape
    inner = x_RI.shape[1]
    assert x_RI.stride(1) == 1 and weight_NI.is_contiguous()
    assert inner % blocks.inner == 0 and inner // blocks.inner >= parts
    block_rows = blocks.rows or min(FEW_ROWS, max(16, triton.next_power_of_2(rows)))
    available = shared_memory(x_RI.device)
    product_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(columns, blocks.columns), parts)](
        x_RI,
        weight_NI,
        out_JRN,
        rows,
        columns,
        inner,
        x_RI.stride(0),
        parts,
        GATED=gated,
        SWAP=blocks.swap,
        BLOCK_R=block_rows,
        BLOCK_N=blocks.columns,
        BLOCK_K=blocks.inner,
        num_stages=blocks.staged(block_rows, gated, available, x_RI.element_size()),
        num_warps=blocks.warps,
    )
