"""Rows cast to e4m3 with their scales in one pass: alone, or as the gate or the norm in front writes them.

The plain form is `kernels.fp8.cast_rows`, of `silu(gate) · up` or of the norm where those are in front; the
bits are the same.

Shapes: R rows, I columns, N = 2·I, C columns, J parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpamayo_dflash.kernels.fp8 import E4M3, CastRows
from alpamayo_dflash.kernels.rows import added_normed_row

_LARGEST = tl.constexpr(448.0)
_SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def e4m3_bits(x):
    """The bits of float32 values of at most 464 in e4m3, uint8, rounded to nearest even, by integers.

    For cards whose Triton has no such conversion, and for its interpreter, whose own does not carry.
    """
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Three bits of the mantissa are left, and the exponent's bias is 7 and not 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below 2^-6 the values are multiples of 2^-9, to which a float32 above 2^23 rounds.
    steps = (tl.abs(x) * 512.0 + 8388608.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0x3C800000, steps, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((bits >> 31) << 7)).to(tl.uint8)


@triton.jit
def _store_cast(x, inside, codes_ptr, scales_ptr, row, width, columns, NATIVE: tl.constexpr):
    """Write a row in e4m3 (its bits) and its scale; x is float32, and 0 where it is not `inside`.

    Triton's largest of two leaves NaN out, so that is asked for by itself.
    """
    scale = tl.div_rn(tl.max(tl.abs(x), axis=0), _LARGEST)
    scale = tl.where(scale < _SMALLEST_SCALE, 1.0, scale)
    wrong = tl.max((x != x).to(tl.int32), axis=0)
    scale = tl.where(wrong != 0, float("nan"), scale)
    values = tl.div_rn(x, tl.zeros_like(x) + scale)
    if NATIVE:
        code = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = e4m3_bits(values)
    tl.store(codes_ptr + row * width + columns, code, mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def cast_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, width, x_stride, NATIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """A row of x in e4m3 and its scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    _store_cast(x, inside, codes_ptr, scales_ptr, row, width, columns, NATIVE)


@triton.jit
def cast_gated_kernel(
    x_ptr, codes_ptr, scales_ptr, width, x_stride, NATIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """A row of silu(gate) · up in e4m3 and its scale; x holds gate's columns and then up's."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    dtype = x_ptr.dtype.element_ty
    gate = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded where separate operations would round.
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    x = (silu * up).to(dtype).to(tl.float32)
    _store_cast(x, inside, codes_ptr, scales_ptr, row, width, columns, NATIVE)


@triton.jit(do_not_specialize=["rows"])
def add_norm_cast_kernel(
    hidden_ptr,
    parts_ptr,
    weight_ptr,
    sum_ptr,
    values_ptr,
    scales_ptr,
    rows,
    width,
    eps,
    RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum = hidden + parts, and its RMS norm in e4m3 with its scale; see `added_normed_row`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < width
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    normed = added_normed_row(
        hidden_ptr,
        parts_ptr,
        weight_ptr,
        sum_ptr,
        row,
        rows,
        c,
        inside,
        width,
        eps,
        DTYPE=dtype,
        RESIDUAL=RESIDUAL,
        PARTS=PARTS,
    )
    _store_cast(normed.to(tl.float32), inside, values_ptr, scales_ptr, row, width, c, NATIVE)


def converts(device: torch.device) -> bool:
    """Whether a device converts to e4m3 itself: GPUs from Ada Lovelace (8.9) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def cast_rows(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.fp8.cast_rows` in one launch: e4m3 [R, I] and scales, float32 [R, 1].

    Args:
        x_RI: the rows, each without gaps.
    """
    return _cast(cast_rows_kernel, x_RI, x_RI.shape[1])


def cast_gated(x_RN: Tensor) -> tuple[Tensor, Tensor]:
    """`cast_rows` of silu(gate) · up in one launch: e4m3 [R, I] and scales, float32 [R, 1].

    Args:
        x_RN: gate's columns, then up's.
    """
    return _cast(cast_gated_kernel, x_RN, x_RN.shape[1] // 2)


def add_norm_cast(
    hidden_RC: Tensor, parts_JRC: Tensor | None, weight_C: Tensor, eps: float
) -> tuple[Tensor, CastRows]:
    """`kernels.rows.add_norm` whose norm is cast as `cast_rows` casts it.

    Args:
        hidden_RC: the residual.
        parts_JRC: from `product`, or None.
        weight_C: of the norm.
        eps: of the norm.

    Returns:
        The sum [R, C] (hidden itself without parts) and the norm.
    """
    rows, width = hidden_RC.shape
    values, scales = _storage(rows, width, hidden_RC.device)
    total = hidden_RC if parts_JRC is None else torch.empty_like(hidden_RC)
    if rows:
        add_norm_cast_kernel[(rows,)](
            hidden_RC,
            hidden_RC if parts_JRC is None else parts_JRC,
            weight_C,
            total,
            values.view(torch.uint8),
            scales,
            rows,
            width,
            eps,
            RESIDUAL=True,
            PARTS=0 if parts_JRC is None else len(parts_JRC),
            NATIVE=converts(hidden_RC.device),
            BLOCK_C=triton.next_power_of_2(width),
            num_warps=8,
        )
    return total, CastRows(values, scales, weight_C.dtype)


def _storage(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.empty(rows, width, dtype=E4M3, device=device)
    return values, torch.empty(rows, 1, dtype=torch.float32, device=device)


def _cast(kernel: triton.runtime.JITFunction, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    assert x.stride(1) == 1
    values, scales = _storage(len(x), width, x.device)
    if len(x):
        kernel[(len(x),)](
            x,
            values.view(torch.uint8),
            scales,
            width,
            x.stride(0),
            NATIVE=converts(x.device),
            BLOCK=triton.next_power_of_2(width),
            num_warps=8,
        )
    return values, scales
