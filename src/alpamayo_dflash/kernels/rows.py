"""Kernels on single rows: the residual sum with its norm, and queries and keys normed, rotated and stored.

Both sum the parts that `product_kernel` leaves. They round where the plain operations in `target/layers.py`
round, so that only the order of sums differs.

Shapes: R rows, C hidden, H query heads, K KV heads, D head dim, E cache entries, J parts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    hidden_ptr,
    parts_ptr,
    weight_ptr,
    sum_ptr,
    normed_ptr,
    rows,
    width,
    eps,
    RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum = hidden + parts, normed = RMS norm of the sum.

    RESIDUAL false: there is no hidden, and the sum is not written. PARTS 0: there are no parts, likewise.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < width
    dtype = normed_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    if RESIDUAL:
        x = tl.load(hidden_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.load(parts_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            at = (part * rows + row) * width
            added += tl.load(parts_ptr + at + c, mask=inside, other=0.0).to(tl.float32)
        added = added.to(dtype).to(tl.float32)
        if RESIDUAL:
            x = (x + added).to(dtype)
            tl.store(sum_ptr + row * width + c, x, mask=inside)
            x = x.to(tl.float32)
        else:
            x = added
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    normed = weight * (x * scale).to(dtype)
    tl.store(normed_ptr + row * width + c, normed.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rotate_store_kernel(
    parts_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    entries_ptr,
    rows,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Norm and rotate q and k; q goes to q_ptr [R, H, D], k and v to entries of the cache [E, K, D].

    Program (r, g) takes BLOCK_H heads of row r; q's, k's and v's heads never share a program.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(1) * BLOCK_H
    i = tl.arange(0, HALF)
    dim: tl.constexpr = 2 * HALF
    heads_all: tl.constexpr = HEADS + 2 * KV_HEADS
    at = head[:, None] * dim + i[None, :]
    dtype = q_ptr.dtype.element_ty
    low = tl.load(parts_ptr + row * heads_all * dim + at).to(tl.float32)
    high = tl.load(parts_ptr + row * heads_all * dim + at + HALF).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        base = (part * rows + row) * heads_all * dim
        low += tl.load(parts_ptr + base + at).to(tl.float32)
        high += tl.load(parts_ptr + base + at + HALF).to(tl.float32)
    low, high = low.to(dtype), high.to(dtype)
    entry = tl.load(entries_ptr + row)
    if first >= HEADS + KV_HEADS:
        out = values_ptr + entry * KV_HEADS * dim - (HEADS + KV_HEADS) * dim
    else:
        norm_ptr = q_norm_ptr if first < HEADS else k_norm_ptr
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        squares = tl.sum(wide_low * wide_low + wide_high * wide_high, axis=1)
        scale = tl.rsqrt(squares / dim + eps)[:, None]
        normed_low = tl.load(norm_ptr + i)[None, :] * (wide_low * scale).to(dtype)
        normed_high = tl.load(norm_ptr + HALF + i)[None, :] * (wide_high * scale).to(dtype)
        cos_low = tl.load(cos_ptr + row * dim + i)[None, :]
        cos_high = tl.load(cos_ptr + row * dim + HALF + i)[None, :]
        sin_low = tl.load(sin_ptr + row * dim + i)[None, :]
        sin_high = tl.load(sin_ptr + row * dim + HALF + i)[None, :]
        low = (normed_low * cos_low).to(dtype) + (-normed_high * sin_low).to(dtype)
        high = (normed_high * cos_high).to(dtype) + (normed_low * sin_high).to(dtype)
        if first < HEADS:
            out = q_ptr + row * HEADS * dim
        else:
            out = keys_ptr + entry * KV_HEADS * dim - HEADS * dim
    tl.store(out + at, low.to(dtype))
    tl.store(out + at + HALF, high.to(dtype))


@triton.jit
def gate_kernel(both_ptr, out_ptr, width, BLOCK_C: tl.constexpr):
    """Out [R, width] = silu(gate) · up of both [R, 2·width], gate first."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < width
    gate = tl.load(both_ptr + row * 2 * width + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + (row * 2 + 1) * width + c, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + c, (silu * up).to(dtype), mask=inside)
