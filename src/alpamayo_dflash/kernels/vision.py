"""The vision tower's small operations and its attention: each image's patches see all of that image.

They round where the modules of the tower round, so that only the order of sums differs. Attention is a
library's or this project's own. The tower's heads are 72 wide: a library's flash attention computes 96
columns for them, or more; here a head is a part of 64 and a rest of 8 in a tile of 16.

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

from alpamayo_dflash.kernels.attention import LOG2_E, Plan, weigh
from alpamayo_dflash.kernels.limits import shared_memory

AttentionKind = Literal["split", "flash", "cudnn", "efficient"]
"""`split` is the kernel below, the others are PyTorch's."""
LIBRARY: dict[AttentionKind, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_LEAST_TILE = 16  # a tensor core's inner dimension


@triton.jit
def add_layer_norm_kernel(
    hidden_ptr,
    added_ptr,
    weight_ptr,
    shift_ptr,
    sum_ptr,
    normed_ptr,
    hidden_rows,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program r: sum = hidden + added, normed = layer norm of the sum. ADD false: of hidden alone."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < width
    dtype = normed_ptr.dtype.element_ty
    x = tl.load(hidden_ptr + row % hidden_rows * width + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(added_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype)
        tl.store(sum_ptr + row * width + c, x, mask=inside)
        x = x.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * width + c, (centred * scale * weight + shift).to(dtype), mask=inside)


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


@triton.jit
def over_patches(
    q,
    q_rest,
    keys_ptr,
    inside,
    scale,
    top,
    mass,
    total,
    total_rest,
    MASKED: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Queries of one head over a tile of keys [T], given by pointers; top, mass and the totals go on."""
    d = tl.arange(0, MAIN)
    rest: tl.constexpr = DIM - MAIN
    values_ptr = keys_ptr + HEADS * DIM
    k_at, v_at = keys_ptr[None, :] + d[:, None], values_ptr[:, None] + d[None, :]
    k = tl.load(k_at, mask=inside[None, :], other=0.0) if MASKED else tl.load(k_at)
    scores = tl.dot(q, k)
    if REST > 0:
        e = tl.arange(0, REST)
        k_at = keys_ptr[None, :] + MAIN + e[:, None]
        mask = (e < rest)[:, None] & inside[None, :] if MASKED else (e < rest)[:, None]
        scores = tl.dot(q_rest, tl.load(k_at, mask=mask, other=0.0), scores)
    scores *= scale
    if MASKED:
        scores = tl.where(inside[None, :], scores, -float("inf"))
    weights, shrink, top, mass = weigh(scores, top, mass)
    weights = weights.to(q.dtype)
    v = tl.load(v_at, mask=inside[:, None], other=0.0) if MASKED else tl.load(v_at)
    total = tl.dot(weights, v, total * shrink[:, None])
    if REST > 0:
        e = tl.arange(0, REST)
        v_at = values_ptr[:, None] + MAIN + e[None, :]
        mask = inside[:, None] & (e < rest)[None, :] if MASKED else (e < rest)[None, :]
        v = tl.load(v_at, mask=mask, other=0.0)
        total_rest = tl.dot(weights, v, total_rest * shrink[:, None])
    return top, mass, total, total_rest


@triton.jit
def images_kernel(
    qkv_ptr,
    out_ptr,
    patches,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program (m, h, n): a tile of queries of head h over all patches of image n.

    `scale` includes log2(e): exponentials are powers of two. MAIN + REST columns are computed of DIM.
    """
    head = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < patches
    first_row = tl.program_id(2).to(tl.int64) * patches
    d = tl.arange(0, MAIN)
    t = tl.arange(0, BLOCK_T)
    rest: tl.constexpr = DIM - MAIN
    row_stride: tl.constexpr = 3 * HEADS * DIM
    q_at = qkv_ptr + (first_row + m)[:, None] * row_stride + head * DIM
    out_at = out_ptr + (first_row + m)[:, None] * (HEADS * DIM) + head * DIM
    q = tl.load(q_at + d[None, :], mask=real[:, None], other=0.0)
    q_rest = q
    top = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, MAIN), dtype=tl.float32)
    total_rest = total
    if REST > 0:
        e = tl.arange(0, REST)
        some = real[:, None] & (e < rest)[None, :]
        q_rest = tl.load(q_at + MAIN + e[None, :], mask=some, other=0.0)
        total_rest = tl.zeros((BLOCK_M, REST), dtype=tl.float32)
    keys_ptr = qkv_ptr + (first_row + t) * row_stride + (HEADS + head) * DIM
    whole = patches // BLOCK_T * BLOCK_T
    for _ in range(0, whole, BLOCK_T):
        top, mass, total, total_rest = over_patches(
            q, q_rest, keys_ptr, real, scale, top, mass, total, total_rest, False, HEADS, DIM, MAIN, REST
        )
        keys_ptr += BLOCK_T * row_stride
    if whole < patches:
        left = whole + t < patches
        top, mass, total, total_rest = over_patches(
            q, q_rest, keys_ptr, left, scale, top, mass, total, total_rest, True, HEADS, DIM, MAIN, REST
        )
    dtype = out_ptr.dtype.element_ty
    tl.store(out_at + d[None, :], (total / mass[:, None]).to(dtype), mask=real[:, None])
    if REST > 0:
        e = tl.arange(0, REST)
        some = real[:, None] & (e < rest)[None, :]
        tl.store(out_at + MAIN + e[None, :], (total_rest / mass[:, None]).to(dtype), mask=some)


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
    like = hidden_RC if added_RC is None else added_RC
    rows, width = like.shape
    normed = torch.empty_like(like)
    total = hidden_RC if added_RC is None else torch.empty_like(like)
    add_layer_norm_kernel[(rows,)](
        hidden_RC,
        like,
        weight_C,
        shift_C,
        total,
        normed,
        len(hidden_RC),
        width,
        eps,
        ADD=added_RC is not None,
        BLOCK_C=triton.next_power_of_2(width),
        num_warps=4 if width <= 2048 else 8,
    )
    return total, normed


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
        num_warps=4,
    )


def head_parts(dim: int) -> tuple[int, int]:
    """Columns of the two tiles that a head of `dim` (16 or more) is computed in; the second may have none."""
    main = 1 << (dim.bit_length() - 1)
    rest = dim - main
    return main, max(_LEAST_TILE, triton.next_power_of_2(rest)) if rest else 0


PLAN = Plan(rows=128, keys=64, stretches=1, warps=8, stages=3)
"""How the project's own attention is cut."""


def attend_images(
    qkv_RN: Tensor, patches: int, heads: int, kind: AttentionKind, plan: Plan | None = None
) -> Tensor:
    """Attention of every image's patches to all of that image.

    Args:
        qkv_RN: rotated queries and keys, and values; N = 3·H·D. It is read where it lies.
        patches: T.
        heads: H.
        kind: who computes it.
        plan: how `split` is cut; `PLAN` by default.

    Returns:
        [R, H·D].

    Raises:
        RuntimeError: the library has no such attention for these tensors.
    """
    rows, dim = len(qkv_RN), qkv_RN.shape[1] // (3 * heads)
    if kind != "split":
        q, k, v = (x.transpose(1, 2) for x in qkv_RN.view(-1, patches, 3, heads, dim).unbind(2))
        with sdpa_kernel(LIBRARY[kind]):
            return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, heads * dim)
    main, rest = head_parts(dim)
    plan = (plan or PLAN).fitted(main + rest, shared_memory(qkv_RN.device), qkv_RN.element_size())
    out = torch.empty(rows, heads * dim, dtype=qkv_RN.dtype, device=qkv_RN.device)
    images_kernel[(triton.cdiv(patches, plan.rows), heads, rows // patches)](
        qkv_RN,
        out,
        patches,
        dim**-0.5 * LOG2_E,
        HEADS=heads,
        DIM=dim,
        MAIN=main,
        REST=rest,
        BLOCK_M=plan.rows,
        BLOCK_T=plan.keys,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    return out
