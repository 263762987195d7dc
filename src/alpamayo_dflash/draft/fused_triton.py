"""`FusedDraft`'s bookkeeping of one round as one kernel, where PyTorch takes thirty launches.

Shapes: S sample, b block, X context, T slots a sample.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places_kernel(
    tokens_ptr,
    lengths_ptr,
    previous_ptr,
    bases_ptr,
    first_ptr,
    anchors_ptr,
    entries_ptr,
    positions_ptr,
    new_ptr,
    seen_ptr,
    per_sample,
    context,
    window,
    slots,
    rows,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program s: sample s's rows, as `fused.places` computes them."""
    sample = tl.program_id(0)
    anchor = tl.load(lengths_ptr + sample) - 1
    previous = tl.load(previous_ptr + sample)
    base = tl.load(bases_ptr + sample)
    tl.store(anchors_ptr + sample, tl.load(tokens_ptr + sample * per_sample + anchor))
    e = tl.arange(0, BLOCK_E)
    generated = e >= context
    number = tl.where(generated, e - context - base, e - context)
    oldest = tl.maximum(anchor - window, tl.load(first_ptr))
    seen = (number >= oldest) & (number < anchor + BLOCK) & ((number >= 0) | (e < context))
    for step in tl.static_range(BLOCK):
        row = sample * BLOCK + step
        fresh = previous + step
        at = context + base + fresh
        tl.store(new_ptr + row, at)
        tl.store(entries_ptr + row, tl.where(fresh < anchor, at, context + slots))
        tl.store(entries_ptr + rows + row, context + base + anchor + step)
        tl.store(positions_ptr + row, fresh + context)
        tl.store(positions_ptr + rows + row, anchor + step + context)
        at_seen = row.to(tl.int64) * (context + slots) + e
        tl.store(seen_ptr + at_seen, seen.to(tl.uint8), mask=e < context + slots)


def place(state, first_1, out, *, context, window, slots):
    """`fused.places` by the kernel, one launch, into `out` (a `DraftPlaces`)."""
    samples, rows = len(out.anchors), len(out.new)
    places_kernel[(samples,)](
        state.tokens,
        state.lengths,
        state.previous,
        state.bases,
        first_1,
        out.anchors,
        out.entries,
        out.positions,
        out.new,
        out.seen,
        state.tokens.shape[1],
        context,
        window,
        slots,
        rows,
        BLOCK=rows // samples,
        BLOCK_E=triton.next_power_of_2(context + slots),
        num_warps=4,
    )
