"""Rows cast to e4m3 with their scales in one pass: alone, or as the kernel in front writes them.

That is a gate, a GELU, a norm, or attention's merging. The plain form is `kernels.fp8.cast_rows` of what they
would write; the bits are the same.

Shapes: R rows, I columns, N = 2·I, C columns, J parts.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpamayo_dflash.kernels.fp8 import E4M3, CastRows
from alpamayo_dflash.kernels.rows import added_normed_row

_LARGEST = tl.constexpr(448.0)
_SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)
_TINY_SCALE, _LIFT = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBE = tl.constexpr(0.044715)


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
def largest_bits(x):
    """The bits of the largest magnitude of float32 values: they have its order as integers, NaN the last."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@triton.jit
def scale_of(bits):
    """A row's scale, by the bits of its largest magnitude."""
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), _LARGEST)
    return tl.where(scale < _SMALLEST_SCALE, 1.0, scale)


@triton.jit
def codes_of(x, scale, NATIVE: tl.constexpr):
    """The bits of a row's values in e4m3, uint8: x / scale in float32, rounded to nearest even.

    A division takes longer than all else here, so each value is multiplied by the scale's reciprocal and
    corrected by what is left, which rounds as the division does (Markstein, "Computation of elementary
    functions on the IBM RISC System/6000 processor", 1990). What is left is exact while it is a normal
    number, so rows of tiny values are lifted first. An infinite scale has reciprocal 0 and corrects nothing.
    """
    # Both arms are written out: Triton compiles what stands after a return too, and `float8e4nv` fails there.
    if NATIVE:
        lift = tl.where(scale < _TINY_SCALE, _LIFT, 1.0)
        scale *= lift
        x *= lift
        inverse = tl.div_rn(1.0, scale)
        divisor = tl.where(scale == float("inf"), 0.0, scale)
        quotient = x * inverse
        # What is too much, times the negative reciprocal: so a zero keeps its sign.
        quotient = tl.fma(tl.fma(quotient, divisor, -x), -inverse, quotient)
        codes = quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = e4m3_bits(tl.div_rn(x, tl.zeros_like(x) + scale))
    return codes


@triton.jit
def _activated(x_ptr, columns, width, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Some columns of a row of what is cast, float32, 0 beyond the width; WHOLE: none lies beyond.

    Rounded where separate operations would round.
    """
    dtype = x_ptr.dtype.element_ty
    if WHOLE:
        x = tl.load(x_ptr + columns).to(tl.float32)
    else:
        x = tl.load(x_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if KIND == "gated":
        if WHOLE:
            up = tl.load(x_ptr + width + columns).to(tl.float32)
        else:
            up = tl.load(x_ptr + width + columns, mask=columns < width, other=0.0).to(tl.float32)
        x = (x / (1.0 + tl.exp(-x))).to(dtype).to(tl.float32)
        x = (x * up).to(dtype).to(tl.float32)
    if KIND == "gelu":
        # 1 + tanh(t) is 2 / (1 + exp(−2t)).
        t = _SQRT_2_OVER_PI * (x + _CUBE * x * x * x)
        x = (x / (1.0 + tl.exp(-2.0 * t))).to(dtype).to(tl.float32)
    return x


@triton.jit
def cast_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    width,
    x_stride,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """A row in e4m3 (its bits) and its scale.

    KIND: plain, x itself; gated, silu(gate) · up of x that holds gate's columns and then up's; gelu, in its
    tanh form. The first BLOCK_A columns are all there, the rest lies in BLOCK_B: 12,288 as 8,192 and 4,096.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    codes_ptr += row * width
    a = tl.arange(0, BLOCK_A)
    x_a = _activated(x_ptr, a, width, KIND, True)
    largest = largest_bits(x_a)
    if BLOCK_B > 0:
        b = BLOCK_A + tl.arange(0, BLOCK_B)
        x_b = _activated(x_ptr, b, width, KIND, False)
        largest = tl.maximum(largest, largest_bits(x_b))
    scale = scale_of(largest)
    tl.store(codes_ptr + a, codes_of(x_a, scale, NATIVE))
    if BLOCK_B > 0:
        tl.store(codes_ptr + b, codes_of(x_b, scale, NATIVE), mask=b < width)
    tl.store(scales_ptr + row, scale)


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
    x = normed.to(tl.float32)
    scale = scale_of(largest_bits(x))
    tl.store(values_ptr + row * width + c, codes_of(x, scale, NATIVE), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit(do_not_specialize=["rows"])
def merge_cast_kernel(
    out_ptr,
    top_ptr,
    mass_ptr,
    q_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    STRETCHES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Program r: `merge_kernel` of all heads of a row, in q's dtype, and that in e4m3 with its scale."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    largest = tl.full((HEADS,), -float("inf"), dtype=tl.float32)
    for stretch in tl.static_range(STRETCHES):
        largest = tl.maximum(largest, tl.load(top_ptr + (stretch * rows + row) * HEADS + head))
    total = tl.zeros((HEADS,), dtype=tl.float32)
    merged = tl.zeros((HEADS, DIM), dtype=tl.float32)
    for stretch in tl.static_range(STRETCHES):
        at = (stretch * rows + row) * HEADS + head
        share = tl.exp2(tl.load(top_ptr + at) - largest)
        total += tl.load(mass_ptr + at) * share
        merged += tl.load(out_ptr + at[:, None] * DIM + d[None, :]) * share[:, None]
    x = tl.reshape((merged / total[:, None]).to(q_ptr.dtype.element_ty).to(tl.float32), (HEADS * DIM,))
    scale = scale_of(largest_bits(x))
    tl.store(codes_ptr + row * HEADS * DIM + tl.arange(0, HEADS * DIM), codes_of(x, scale, NATIVE))
    tl.store(scales_ptr + row, scale)


def converts(device: torch.device) -> bool:
    """Whether a device converts to e4m3 itself: GPUs from Ada Lovelace (8.9) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def cast_rows(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.fp8.cast_rows` in one launch: e4m3 [R, I] and scales, float32 [R, 1].

    Args:
        x_RI: the rows, each without gaps.
    """
    return _cast(x_RI, x_RI.shape[1], "plain")


def cast_gated(x_RN: Tensor) -> tuple[Tensor, Tensor]:
    """`cast_rows` of silu(gate) · up in one launch: e4m3 [R, I] and scales, float32 [R, 1].

    Args:
        x_RN: gate's columns, then up's.
    """
    return _cast(x_RN, x_RN.shape[1] // 2, "gated")


def cast_gelu(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """`cast_rows` of the GELU of x in its tanh form, in one launch: e4m3 [R, I] and scales [R, 1]."""
    return _cast(x_RI, x_RI.shape[1], "gelu")


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
    values, scales = cast_storage(rows, width, hidden_RC.device)
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


MOST_STRETCHES = 9
"""Up to so many stretches one kernel merges and casts faster than two (docs/results/fp8_tries_h200.json)."""
_MOST_WARPS = 32


def merge_cast(out_JRHD: Tensor, tops_2JRH: Tensor, q_RHD: Tensor) -> CastRows:
    """`kernels.attention.merge` of heads and head dims that are powers of two, cast as `cast_rows` casts it.

    Args:
        out_JRHD: float32, unnormalised.
        tops_2JRH: float32, each one's largest scores and masses.
        q_RHD: the queries, in whose dtype the outcome is rounded.
    """
    stretches, rows, heads, dim = out_JRHD.shape
    values, scales = cast_storage(rows, heads * dim, q_RHD.device)
    merge_cast_kernel[(rows,)](
        out_JRHD,
        tops_2JRH[0],
        tops_2JRH[1],
        q_RHD,
        values.view(torch.uint8),
        scales,
        rows,
        STRETCHES=stretches,
        HEADS=heads,
        DIM=dim,
        NATIVE=converts(q_RHD.device),
        num_warps=max(1, min(_MOST_WARPS, heads * dim // 128)),
    )
    return CastRows(values, scales, q_RHD.dtype)


def cast_storage(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where rows in e4m3 [R, I] and their scales, float32 [R, 1], are written."""
    values = torch.empty(rows, width, dtype=E4M3, device=device)
    return values, torch.empty(rows, 1, dtype=torch.float32, device=device)


def halves(width: int) -> tuple[int, int]:
    """A row's columns as two blocks, powers of two: the first full, the second for the rest (0: none)."""
    most = 1 << width.bit_length() - 1
    return most, 0 if width == most else max(16, triton.next_power_of_2(width - most))


def warps_of(width: int) -> int:
    """The warps of a program that casts a row."""
    return min(8, max(4, width // 1024))


def _cast(x: Tensor, width: int, kind: Literal["plain", "gated", "gelu"]) -> tuple[Tensor, Tensor]:
    assert x.stride(1) == 1
    values, scales = cast_storage(len(x), width, x.device)
    if len(x):
        first, rest = halves(width)
        cast_kernel[(len(x),)](
            x,
            values.view(torch.uint8),
            scales,
            width,
            x.stride(0),
            KIND=kind,
            NATIVE=converts(x.device),
            BLOCK_A=first,
            BLOCK_B=rest,
            num_warps=warps_of(first),
        )
    return values, scales
