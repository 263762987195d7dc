"""Attention of every sample's way-points: over one prompt, their own text and themselves.

The prompt's keys and values are read where they lie, by the way-points of all samples in one launch: a
program takes a tile of one sample's folded rows and a stretch of the prompt, and the last stretch, or one of
its own, the sample's text and its way-points. Stretches are merged by log-sum-exp. Nothing is masked but the
ends: all way-points of a sample see the same. Lengths are read on the device.

Shapes: S sample, N way-points, R = S·N rows, H query heads, K KV heads, G = H/K, D head dim, E cache entries,
T slots a sample, J stretches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpamayo_dflash.kernels.attention import LOG2_E, Plan, merge, over_prompt, weigh
from alpamayo_dflash.kernels.fp8 import CastRows
from alpamayo_dflash.kernels.fp8_triton import cast_rows
from alpamayo_dflash.kernels.limits import shared_memory


@triton.jit
def over_entries(
    q,
    keys_ptr,
    values_ptr,
    entry,
    inside,
    kv,
    scale,
    top,
    mass,
    total,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Queries [M, D] of one KV head over a tile of entries, wherever these lie; top, mass and total go on."""
    d = tl.arange(0, DIM)
    at = entry.to(tl.int64) * (KV_HEADS * DIM) + kv * DIM
    k = tl.load(keys_ptr + at[None, :] + d[:, None], mask=inside[None, :], other=0.0)
    scores = tl.where(inside[None, :], tl.dot(q, k) * scale, -float("inf"))
    weights, shrink, top, mass = weigh(scores, top, mass)
    v = tl.load(values_ptr + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    total = tl.dot(weights.to(q.dtype), v, total * shrink[:, None])
    return top, mass, total


@triton.jit(do_not_specialize=["waypoints", "stretches", "own_stretch", "table_width"])
def waypoints_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    own_keys_ptr,
    own_values_ptr,
    length_ptr,
    texts_ptr,
    slots_ptr,
    out_ptr,
    top_ptr,
    mass_ptr,
    rows,
    waypoints,
    table_width,
    scale,
    stretches,
    own_stretch,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Partial outputs of one stretch, as `stretches_kernel`; `own_stretch` takes text and way-points.

    ALONE: there is one stretch, and out [R, H, D] is the outcome.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    tiles = tl.cdiv(waypoints * group, BLOCK_M)
    sample = tl.program_id(0) // tiles
    kv = tl.program_id(1)
    stretch = tl.program_id(2)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < waypoints * group
    row = sample * waypoints + m // group
    head = kv * group + m % group
    d = tl.arange(0, DIM)
    t = tl.arange(0, BLOCK_T)
    q_at = (row.to(tl.int64) * HEADS + head)[:, None] * DIM + d[None, :]
    q = tl.load(q_ptr + q_at, mask=real[:, None], other=0.0)
    top = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, DIM), dtype=tl.float32)
    prompt = tl.load(length_ptr).to(tl.int32)
    if stretch < stretches:
        # Whole tiles, dealt out evenly: the bounds depend on the prompt's length alone.
        keys = tl.cdiv(prompt, BLOCK_T)
        start = stretch * keys // stretches * BLOCK_T
        stop = tl.minimum((stretch + 1) * keys // stretches * BLOCK_T, prompt)
        top, mass, total = over_prompt(
            q, keys_ptr, values_ptr, start, stop, kv, scale, top, mass, total, KV_HEADS, DIM, BLOCK_T
        )
    if stretch == own_stretch:
        text = tl.load(texts_ptr + sample).to(tl.int32)
        for first in range(0, text, BLOCK_T):
            inside = first + t < text
            slot = tl.load(slots_ptr + sample * table_width + first + t, mask=inside, other=0)
            top, mass, total = over_entries(
                q, keys_ptr, values_ptr, prompt + slot, inside, kv, scale, top, mass, total, KV_HEADS, DIM
            )
        for first in range(0, waypoints, BLOCK_T):
            inside = first + t < waypoints
            entry = sample * waypoints + first + t
            top, mass, total = over_entries(
                q, own_keys_ptr, own_values_ptr, entry, inside, kv, scale, top, mass, total, KV_HEADS, DIM
            )
    if ALONE:
        tl.store(out_ptr + q_at, (total / mass[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None])
    else:
        flat = (stretch * rows + row).to(tl.int64) * HEADS + head
        tl.store(top_ptr + flat, top, mask=real)
        tl.store(mass_ptr + flat, mass, mask=real)
        tl.store(out_ptr + flat[:, None] * DIM + d[None, :], total, mask=real[:, None])


@dataclass(frozen=True)
class WaypointPlan(Plan):
    """A plan whose rows are of one sample.

    Attributes:
        apart: whether text and way-points have a stretch of their own, or share the prompt's last.
        registers: the most a thread may have, so that two programs fit a multiprocessor; None for no limit.
    """

    apart: bool = True
    registers: int | None = None

    @property
    def count(self) -> int:
        """J, stretches in all."""
        return self.stretches + self.apart


# The fastest of some 1,300 tried on one H200 (docs/results/expert_plans_h200.json).
PLANS = {
    128: WaypointPlan(64, 64, 6, 4, 3),
    256: WaypointPlan(64, 64, 4, 4, 3),
    384: WaypointPlan(128, 64, 5, 8, 3),
    512: WaypointPlan(64, 64, 2, 4, 3, apart=False),
    1024: WaypointPlan(128, 64, 2, 8, 3, apart=False),
    2048: WaypointPlan(128, 64, 1, 8, 3, apart=False),
}
"""By the most folded rows (samples · N · G) that a plan is for; the last for all more."""


def plan_of(folded: int) -> WaypointPlan:
    """The plan for so many folded rows."""
    return next((plan for most, plan in PLANS.items() if folded <= most), PLANS[max(PLANS)])


def attend_waypoints(
    q_RHD: Tensor,
    cached: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    length_1: Tensor,
    texts_S: Tensor,
    slots_ST: Tensor,
    plan: WaypointPlan | None = None,
    *,
    cast: bool = False,
) -> Tensor | CastRows:
    """Attention of every sample's way-points.

    Args:
        q_RHD: rotated queries, sample after sample.
        cached: keys and values [E, K, D]: the prompt's entries, then the texts' slots.
        own: the way-points' keys and values [R, K, D].
        length_1: int64 [1] on the device, the prompt's entries.
        texts_S: int32 on the device, tokens that each sample's way-points see.
        slots_ST: int32 on the device, the slots of these tokens; what is behind a text is not read.
        plan: how it is cut; by default what suits so many rows.
        cast: to rows in e4m3.

    Returns:
        [R, H·D].
    """
    rows, heads, dim = q_RHD.shape
    samples, kv_heads = len(texts_S), own[0].shape[1]
    waypoints, group = rows // samples, heads // kv_heads
    plan = plan or plan_of(rows * group)
    plan = plan.fitted(dim, shared_memory(q_RHD.device), q_RHD.element_size())
    count, device = plan.count, q_RHD.device
    out_dtype = torch.float32 if count > 1 else q_RHD.dtype
    out = torch.empty(count, rows, heads, dim, dtype=out_dtype, device=device)
    tops = torch.empty(2, count, rows, heads, dtype=torch.float32, device=device)
    waypoints_kernel[(samples * triton.cdiv(waypoints * group, plan.rows), kv_heads, count)](
        q_RHD,
        *cached,
        *own,
        length_1,
        texts_S,
        slots_ST,
        out,
        tops[0],
        tops[1],
        rows,
        waypoints,
        slots_ST.stride(0),
        dim**-0.5 * LOG2_E,
        plan.stretches,
        count - 1,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK_M=plan.rows,
        BLOCK_T=plan.keys,
        ALONE=count == 1,
        num_warps=plan.warps,
        num_stages=plan.stages,
        maxnreg=plan.registers,
    )
    if count > 1:
        return merge(out, tops, q_RHD, cast=cast)
    merged = out.view(rows, heads * dim)
    return CastRows(*cast_rows(merged), merged.dtype) if cast else merged
