"""Attention of a few rows over a long prompt and a short tail, split over keys and merged by log-sum-exp.

A program takes the query heads of one KV head for some rows, and a stretch of keys: of the prompt, which
every row sees whole, or of the tail, of which a row sees what the mask says (Dao et al., "Flash-Decoding",
2023). The prompt's length is read on the device, so one captured graph serves every prompt.

Shapes: R rows, H query heads, K KV heads, G = H/K, D head dim, E cache entries, T tail slots, J stretches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpamayo_dflash.kernels.fp8 import CastRows
from alpamayo_dflash.kernels.fp8_triton import MOST_STRETCHES, cast_rows, merge_cast
from alpamayo_dflash.kernels.limits import fitting_stages, shared_memory


@triton.jit
def weigh(scores, top, mass):
    """Online softmax: weights of scores by the largest so far, and how far what came before shrinks by it."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing yet
    shrink = tl.exp2(top - safe)
    weights = tl.exp2(scores - safe[:, None])
    return weights, shrink, new_top, mass * shrink + tl.sum(weights, axis=1)


@triton.jit
def over_prompt(
    q,
    keys_ptr,
    values_ptr,
    start,
    stop,
    kv,
    scale,
    top,
    mass,
    total,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Queries [M, D] of one KV head over the prompt's entries [start, stop), all of which they see.

    Returns top, mass and total, which go on from those given.
    """
    entry_stride: tl.constexpr = KV_HEADS * DIM
    d = tl.arange(0, DIM)
    t = tl.arange(0, BLOCK_T)
    whole = start + tl.maximum(stop - start, 0) // BLOCK_T * BLOCK_T
    at = (start + t).to(tl.int64) * entry_stride + kv * DIM
    k_at = keys_ptr + at[None, :] + d[:, None]
    v_at = values_ptr + at[:, None] + d[None, :]
    for _ in range(start, whole, BLOCK_T):
        weights, shrink, top, mass = weigh(tl.dot(q, tl.load(k_at)) * scale, top, mass)
        total = tl.dot(weights.to(q.dtype), tl.load(v_at), total * shrink[:, None])
        k_at += BLOCK_T * entry_stride
        v_at += BLOCK_T * entry_stride
    if whole < stop:
        inside = whole + t < stop
        k = tl.load(k_at, mask=inside[None, :], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, k) * scale, -float("inf"))
        weights, shrink, top, mass = weigh(scores, top, mass)
        v = tl.load(v_at, mask=inside[:, None], other=0.0)
        total = tl.dot(weights.to(q.dtype), v, total * shrink[:, None])
    return top, mass, total


@triton.jit(do_not_specialize=["rows", "slots", "prompt_stretches", "tail_stretch"])
def stretches_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    length_ptr,
    mask_ptr,
    out_ptr,
    top_ptr,
    mass_ptr,
    rows,
    slots,
    scale,
    prompt_stretches,
    tail_stretch,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Partial outputs of one stretch of keys: out [J, R, H, D] float32 unnormalised, top and mass [J, R, H].

    `scale` includes log2(e): exponentials are powers of two. mask [R, T] is 1 where a row sees a slot.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    kv = tl.program_id(0)
    stretch = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = m // group
    head = kv * group + m % group
    real = row < rows
    d = tl.arange(0, DIM)
    t = tl.arange(0, BLOCK_T)
    prompt = tl.load(length_ptr).to(tl.int32)
    q_at = (row.to(tl.int64) * HEADS + head)[:, None] * DIM + d[None, :]
    q = tl.load(q_ptr + q_at, mask=real[:, None], other=0.0)
    top = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, DIM), dtype=tl.float32)
    entry_stride: tl.constexpr = KV_HEADS * DIM
    if stretch < prompt_stretches:
        # Stretches of whole tiles, so that their bounds depend on the prompt's length alone.
        tiles = tl.cdiv(tl.cdiv(prompt, BLOCK_T), prompt_stretches)
        start = stretch * tiles * BLOCK_T
        stop = tl.minimum(start + tiles * BLOCK_T, prompt)
        top, mass, total = over_prompt(
            q, keys_ptr, values_ptr, start, stop, kv, scale, top, mass, total, KV_HEADS, DIM, BLOCK_T
        )
    else:
        start = (stretch - prompt_stretches) * tail_stretch
        for first in range(start, tl.minimum(start + tail_stretch, slots), BLOCK_T):
            slot = first + t
            inside = slot < slots
            mask_at = row[:, None].to(tl.int64) * slots + slot[None, :]
            seen = tl.load(mask_ptr + mask_at, mask=real[:, None] & inside[None, :], other=0) != 0
            if tl.max(tl.max(seen.to(tl.int32), axis=1), axis=0) > 0:
                at = (prompt + slot).to(tl.int64) * entry_stride + kv * DIM
                k = tl.load(keys_ptr + at[None, :] + d[:, None], mask=inside[None, :], other=0.0)
                scores = tl.where(seen, tl.dot(q, k) * scale, -float("inf"))
                weights, shrink, top, mass = weigh(scores, top, mass)
                v = tl.load(values_ptr + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
                total = tl.dot(weights.to(v.dtype), v, total * shrink[:, None])
    flat = (stretch * rows + row).to(tl.int64) * HEADS + head
    tl.store(top_ptr + flat, top, mask=real)
    tl.store(mass_ptr + flat, mass, mask=real)
    tl.store(out_ptr + flat[:, None] * DIM + d[None, :], total, mask=real[:, None])


@triton.jit(do_not_specialize=["places", "stretches"])
def merge_kernel(
    out_ptr,
    top_ptr,
    mass_ptr,
    merged_ptr,
    places,
    stretches,
    DIM: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merged [R·H, D] = the stretches' outputs, weighed by exp2(top − largest), over the sum of masses."""
    place = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    j = tl.arange(0, BLOCK_J)
    d = tl.arange(0, DIM)
    real = place < places
    inside = (j < stretches)[:, None] & real[None, :]
    at = j[:, None].to(tl.int64) * places + place[None, :]
    top = tl.load(top_ptr + at, mask=inside, other=-float("inf"))
    mass = tl.load(mass_ptr + at, mask=inside, other=0.0)
    out = tl.load(out_ptr + at[:, :, None] * DIM + d[None, None, :], mask=inside[:, :, None], other=0.0)
    largest = tl.max(top, axis=0)
    share = tl.exp2(top - tl.where(real, largest, 0.0)[None, :])
    total = tl.sum(mass * share, axis=0)
    merged = tl.sum(out * share[:, :, None], axis=0) / tl.where(real, total, 1.0)[:, None]
    merged_at = place[:, None].to(tl.int64) * DIM + d[None, :]
    tl.store(merged_ptr + merged_at, merged.to(merged_ptr.dtype.element_ty), mask=real[:, None])


LOG2_E = 1.4426950408889634
_LEAST_TILE = 16
_MERGED = 32
"""Lines of stretches that a warp merges."""
_MOST_MERGED = 4
"""Places that it does this for."""


@dataclass(frozen=True)
class Plan:
    """How attention is cut.

    Attributes:
        rows: folded rows of a tile: rows times the query heads of a KV head.
        keys: of a tile.
        stretches: programs that share the prompt.
        warps: of a program.
        stages: of its loads.
        tail: slots of a tail stretch; 0 where `plan_of` makes all stretches one wave of programs.
    """

    rows: int
    keys: int
    stretches: int
    warps: int
    stages: int
    tail: int = 128

    def fitted(self, dim: int, available: int, element_bytes: int = 2) -> Self:
        """The plan with as many keys and stages as fit so much shared memory."""
        plan, line = self, element_bytes * dim
        while True:
            stages = fitting_stages(plan.stages, 2 * plan.keys * line, plan.rows * line, available)
            if stages >= 2 or (plan.keys <= _LEAST_TILE and plan.rows <= _LEAST_TILE):
                return replace(plan, stages=max(stages, 1))
            if plan.keys > _LEAST_TILE:
                plan = replace(plan, keys=plan.keys // 2)
            else:
                plan = replace(plan, rows=plan.rows // 2)


_PLANS = {
    16: Plan(16, 32, 32, 4, 3),
    64: Plan(64, 64, 12, 4, 3),
    512: Plan(64, 64, 12, 4, 3, tail=0),
    1024: Plan(64, 64, 3, 4, 3, tail=768),
}
"""By the most folded rows (rows times query heads of a KV head) that a plan is for; the last for all more."""
_WAVE = 264
"""Programs of 64 folded rows that an H100 or H200 runs at once."""
_PROMPT = 3072
"""Entries of the prompt that this is reckoned with."""
_SLOT_COST = 1.6
"""A tail slot's time over a prompt entry's: its mask is read too (docs/results/attention_tries_h200.json)."""


def plan_of(folded: int, kv_heads: int, slots: int, *, dim: int, available: int) -> Plan:
    """How attention is cut.

    Args:
        folded: rows times query heads of a KV head.
        kv_heads: K.
        slots: T.
        dim: D.
        available: bytes of shared memory.
    """
    plan = next((plan for most, plan in _PLANS.items() if folded <= most), _PLANS[max(_PLANS)])
    plan = plan.fitted(dim, available)
    if plan.tail:
        return plan
    count = max(2, _WAVE // (kv_heads * -(-folded // plan.rows)))

    def divided(tails: int) -> Plan:
        tiles = -(-slots // (tails * plan.keys))
        return replace(plan, stretches=min(plan.stretches, count - tails), tail=tiles * plan.keys)

    def slowest(cut: Plan) -> float:
        return max(_PROMPT / cut.stretches, _SLOT_COST * cut.tail)

    return min(map(divided, range(1, count)), key=slowest)


def attend(
    q_RHD: Tensor,
    keys_EKD: Tensor,
    values_EKD: Tensor,
    length_1: Tensor,
    mask_RT: Tensor,
    *,
    prompt: bool = True,
    cast: bool = False,
) -> Tensor | CastRows:
    """Attention of rows over a prompt and a tail after it in the cache.

    Args:
        q_RHD: rotated queries.
        keys_EKD: the prompt's entries, then the tail's.
        values_EKD: likewise.
        length_1: int64 [1] on the device, the prompt's entries.
        mask_RT: uint8, 1 where a row sees a slot of the tail. Every row must see something.
        prompt: whether there may be a prompt; without, `length_1` is 0.
        cast: to rows in e4m3.

    Returns:
        [R, H·D].
    """
    rows, heads, dim = q_RHD.shape
    kv_heads = keys_EKD.shape[1]
    folded, slots = rows * (heads // kv_heads), mask_RT.shape[1]
    plan = plan_of(folded, kv_heads, slots, dim=dim, available=shared_memory(q_RHD.device))
    tiles = triton.cdiv(folded, plan.rows)
    stretches = plan.stretches if prompt else 0
    tail = triton.cdiv(slots, plan.tail)
    count = stretches + tail
    out = torch.empty(count, rows, heads, dim, dtype=torch.float32, device=q_RHD.device)
    tops = torch.empty(2, count, rows, heads, dtype=torch.float32, device=q_RHD.device)
    stretches_kernel[(kv_heads, count, tiles)](
        q_RHD,
        keys_EKD,
        values_EKD,
        length_1,
        mask_RT,
        out,
        tops[0],
        tops[1],
        rows,
        slots,
        dim**-0.5 * LOG2_E,
        stretches,
        plan.tail,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK_M=plan.rows,
        BLOCK_T=plan.keys,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    return merge(out, tops, q_RHD, cast=cast)


def merge(out_JRHD: Tensor, tops_2JRH: Tensor, q_RHD: Tensor, *, cast: bool = False) -> Tensor | CastRows:
    """Merge stretches' partial outputs, [R, H·D] in the queries' dtype.

    Args:
        out_JRHD: float32, unnormalised.
        tops_2JRH: float32, each one's largest scores and masses.
        q_RHD: the queries.
        cast: to rows in e4m3.
    """
    count, rows, heads, dim = out_JRHD.shape
    if cast and heads & (heads - 1) == 0 and count <= MOST_STRETCHES:
        return merge_cast(out_JRHD, tops_2JRH, q_RHD)
    merged_RN = torch.empty(rows, heads * dim, dtype=q_RHD.dtype, device=q_RHD.device)
    stretches = triton.next_power_of_2(count)
    # A warp for a few places: sums over stretches then need no other warp (docs/log.md, 2026-11-27).
    together = max(1, min(_MOST_MERGED, _MERGED // stretches))
    merge_kernel[(triton.cdiv(rows * heads, together),)](
        out_JRHD,
        tops_2JRH[0],
        tops_2JRH[1],
        merged_RN,
        rows * heads,
        count,
        DIM=dim,
        BLOCK_J=stretches,
        BLOCK_P=together,
        num_warps=1 if stretches <= _MERGED else 2,
    )
    return CastRows(*cast_rows(merged_RN), merged_RN.dtype) if cast else merged_RN
