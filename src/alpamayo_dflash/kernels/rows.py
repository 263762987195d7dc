"""Kernels on single rows: the residual sum with its norm, and queries and keys normed, rotated and stored.

Both sum the parts that `product_kernel` leaves. They round where the plain operations in `target/qwen3.py`
round, so that only the order of sums differs.

Shapes: R rows, C hidden, H query heads, K KV heads, D head dim, E cache entries, J parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def added_normed_row(
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
    DTYPE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The RMS norm of a row of hidden + parts, in DTYPE; the sum is written.

    RESIDUAL false: there is no hidden, and the sum is not written. PARTS 0: there are no parts, likewise.
    """
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    if RESIDUAL:
        x = tl.load(hidden_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.load(parts_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            at = (part * rows + row) * width
            added += tl.load(parts_ptr + at + c, mask=inside, other=0.0).to(tl.float32)
        added = added.to(DTYPE).to(tl.float32)
        if RESIDUAL:
            x = (x + added).to(DTYPE)
            tl.store(sum_ptr + row * width + c, x, mask=inside)
            x = x.to(tl.float32)
        else:
            x = added
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    return (weight * (x * scale).to(DTYPE)).to(DTYPE)


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
    """Sum = hidden + parts, normed = RMS norm of the sum; see `added_normed_row`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < width
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
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
    tl.store(normed_ptr + row * width + c, normed, mask=inside)


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


def gate(both_RN: Tensor) -> Tensor:
    """silu(gate) · up, [R, N/2], of [R, N] that holds gate, then up."""
    rows, width = len(both_RN), both_RN.shape[1] // 2
    out = torch.empty(rows, width, dtype=both_RN.dtype, device=both_RN.device)
    block = 1024
    gate_kernel[(rows, triton.cdiv(width, block))](both_RN, out, width, BLOCK_C=block, num_warps=4)
    return out


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
