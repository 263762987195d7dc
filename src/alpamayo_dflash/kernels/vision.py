"""The vision tower's small operations and its attention: each image's patches see all of that image.

They round where the modules of the tower round, so that only the order of sums differs. Attention is a
library's.

Shapes: N images, T patches of an image, R = N·T rows, C hidden, H heads, D head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from alpamayo_dflash.kernels.fp8 import CastRows
from alpamayo_dflash.kernels.fp8_triton import (
    cast_storage,
    codes_of,
    converts,
    halves,
    largest_bits,
    scale_of,
)

AttentionKind = Literal["flash", "cudnn", "efficient"]
LIBRARY: dict[AttentionKind, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@triton.jit
def add_layer_norm_kernel(
    hidden_ptr,
    added_ptr,
    weight_ptr,
    shift_ptr,
    sum_ptr,
    normed_ptr,
    scales_ptr,
    hidden_rows,
    width,
    eps,
    ADD: tl.constexpr,
    CAST: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Program r: sum = hidden + added, normed = layer norm of the sum. ADD false: of hidden alone.

    CAST: normed is in e4m3 (its bits), with a scale a row; see `kernels.fp8_triton`.
    The first BLOCK_A columns are all there, the rest lie in BLOCK_B: 1,152 as 1,024 and 128, not as 2,048.
    """
    row = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, BLOCK_A)
    b = BLOCK_A + tl.arange(0, BLOCK_B)
    inside = b < width
    dtype = weight_ptr.dtype.element_ty
    hidden = hidden_ptr + row % hidden_rows * width
    x = tl.load(hidden + a).to(tl.float32)
    y = tl.load(hidden + b, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(added_ptr + row * width + a).to(tl.float32)
        y += tl.load(added_ptr + row * width + b, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype)
        y = y.to(dtype)
        tl.store(sum_ptr + row * width + a, x)
        tl.store(sum_ptr + row * width + b, y, mask=inside)
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    mean = (tl.sum(x, axis=0) + tl.sum(y, axis=0)) / width
    x -= mean
    y = tl.where(inside, y - mean, 0.0)
    scale = tl.rsqrt((tl.sum(x * x, axis=0) + tl.sum(y * y, axis=0)) / width + eps)
    weight_a, shift_a = tl.load(weight_ptr + a).to(tl.float32), tl.load(shift_ptr + a).to(tl.float32)
    weight_b = tl.load(weight_ptr + b, mask=inside, other=0.0).to(tl.float32)
    shift_b = tl.load(shift_ptr + b, mask=inside, other=0.0).to(tl.float32)
    x = (x * scale * weight_a + shift_a).to(dtype)
    y = (y * scale * weight_b + shift_b).to(dtype)
    if CAST:
        x, y = x.to(tl.float32), y.to(tl.float32)
        row_scale = scale_of(tl.maximum(largest_bits(x), largest_bits(y)))
        x, y = codes_of(x, row_scale, NATIVE), codes_of(y, row_scale, NATIVE)
        tl.store(scales_ptr + row, row_scale)
    tl.store(normed_ptr + row * width + a, x)
    tl.store(normed_ptr + row * width + b, y, mask=inside)


@triton.jit
def rotate_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    patches,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (r, s): rotate q's heads (s = 0) or k's (s = 1) of row r in place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_D)
    dim: tl.constexpr = 2 * HALF
    inside = (head < HEADS)[:, None] & (i < HALF)[None, :]
    at = qkv_ptr + (row * 3 + tl.program_id(1)) * HEADS * dim + head[:, None] * dim + i[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = row % patches * dim + i
    cos_low = tl.load(cos_ptr + angle, mask=i < HALF, other=0.0)[None, :]
    cos_high = tl.load(cos_ptr + angle + HALF, mask=i < HALF, other=0.0)[None, :]
    sin_low = tl.load(sin_ptr + angle, mask=i < HALF, other=0.0)[None, :]
    sin_high = tl.load(sin_ptr + angle + HALF, mask=i < HALF, other=0.0)[None, :]
    dtype = qkv_ptr.dtype.element_ty
    tl.store(at, (low * cos_low - high * sin_low).to(dtype), mask=inside)
    tl.store(at + HALF, (high * cos_high + low * sin_high).to(dtype), mask=inside)


def add_layer_norm(
    hidden_RC: Tensor, added_RC: Tensor | None, weight_C: Tensor, shift_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Hidden + added, and its layer norm.

    Args:
        hidden_RC: the residual; or [T, C], which all images share.
        added_RC: what is added; None for nothing.
        weight_C: of the norm.
        shift_C: its bias.
        eps: of the norm.

    Returns:
        The sum [R, C] (hidden itself where nothing is added) and the norm [R, C].
    """
    normed = torch.empty_like(hidden_RC if added_RC is None else added_RC)
    return _add_layer_norm(hidden_RC, added_RC, weight_C, shift_C, eps, normed, None), normed


def add_layer_norm_cast(
    hidden_RC: Tensor, added_RC: Tensor | None, weight_C: Tensor, shift_C: Tensor, eps: float
) -> tuple[Tensor, CastRows]:
    """`add_layer_norm` whose norm is cast as `kernels.fp8.cast_rows` casts it."""
    like = hidden_RC if added_RC is None else added_RC
    values, scales = cast_storage(*like.shape, like.device)
    codes = values.view(torch.uint8)
    total = _add_layer_norm(hidden_RC, added_RC, weight_C, shift_C, eps, codes, scales)
    return total, CastRows(values, scales, weight_C.dtype)


def _add_layer_norm(
    hidden_RC: Tensor,
    added_RC: Tensor | None,
    weight_C: Tensor,
    shift_C: Tensor,
    eps: float,
    normed_RC: Tensor,
    scales_R1: Tensor | None,
) -> Tensor:
    """Write the norm, with scales as e4m3's bits, and return the sum."""
    rows, width = normed_RC.shape
    like = hidden_RC if added_RC is None else added_RC
    total = hidden_RC if added_RC is None else torch.empty_like(like)
    first, rest = halves(width)
    add_layer_norm_kernel[(rows,)](
        hidden_RC,
        like,
        weight_C,
        shift_C,
        total,
        normed_RC,
        normed_RC if scales_R1 is None else scales_R1,
        len(hidden_RC),
        width,
        eps,
        ADD=added_RC is not None,
        CAST=scales_R1 is not None,
        NATIVE=converts(normed_RC.device),
        BLOCK_A=first,
        BLOCK_B=max(16, rest),
        num_warps=4 if width <= 2048 else 8,
    )
    return total


def rotate_in_place(qkv_RN: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: int) -> None:
    """Rotate queries and keys where the fused product of q, k and v has left them.

    Args:
        qkv_RN: N = 3·H·D.
        cos_TD: float32, of an image's patches.
        sin_TD: likewise.
        heads: H.
    """
    patches, dim = cos_TD.shape
    rotate_kernel[(len(qkv_RN), 2)](
        qkv_RN,
        cos_TD,
        sin_TD,
        patches,
        HEADS=heads,
        HALF=dim // 2,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=triton.next_power_of_2(dim // 2),
        num_warps=8,
    )


def attend_images(qkv_RN: Tensor, patches: int, heads: int, kind: AttentionKind) -> Tensor:
    """Attention of every image's patches to all of that image.

    Args:
        qkv_RN: rotated queries and keys, and values; N = 3·H·D. It is read where it lies.
        patches: T.
        heads: H.
        kind: which of PyTorch's kernels computes it.

    Returns:
        [R, H·D].

    Raises:
        RuntimeError: the library has no such attention for these tensors.
    """
    rows, dim = len(qkv_RN), qkv_RN.shape[1] // (3 * heads)
    q, k, v = (x.transpose(1, 2) for x in qkv_RN.view(-1, patches, 3, heads, dim).unbind(2))
    with sdpa_kernel(LIBRARY[kind]):
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, heads * dim)
