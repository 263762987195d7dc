"""The steps of `decode.steps` as kernels, a program a sample, one launch each.

Shapes: S sample, b block, W rows of one sample, R rows, T slots a sample, E slots of the tail.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from alpamayo_dflash.decode.steps import FIELDS, NONE, REASONS, Chains, Marks, Picks, State
from alpamayo_dflash.decode.stops import StopReason

_FIELDS = tl.constexpr(len(FIELDS))
_EMITTED = tl.constexpr(FIELDS.index("emitted"))
_ACCEPTED = tl.constexpr(FIELDS.index("accepted"))
_DRAFTED = tl.constexpr(FIELDS.index("drafted"))
_OFFERED = tl.constexpr(FIELDS.index("offered"))
_PROPOSED = tl.constexpr(FIELDS.index("proposed"))
_FAILED = tl.constexpr(FIELDS.index("failed"))
_UNSETTLED = tl.constexpr(FIELDS.index("unsettled"))
_BROKEN = tl.constexpr(FIELDS.index("broken"))
_ANCHOR = tl.constexpr(FIELDS.index("anchor"))
_AT_TRAJ = tl.constexpr(REASONS.index(StopReason.TRAJ_FUTURE_START))
_AT_EOS = tl.constexpr(REASONS.index(StopReason.EOS))
_AT_LIMIT = tl.constexpr(REASONS.index(StopReason.LIMIT))
_NONE = tl.constexpr(NONE)


@triton.jit
def propose_kernel(
    tokens_ptr,
    lengths_ptr,
    done_ptr,
    pending_ptr,
    limit_ptr,
    bases_ptr,
    columns_ptr,
    finite_ptr,
    ids_ptr,
    chains_ptr,
    chain_lengths_ptr,
    row_tokens_ptr,
    row_positions_ptr,
    next_positions_ptr,
    row_slots_ptr,
    seen_ptr,
    proposed_ptr,
    drafted_ptr,
    offered_ptr,
    failed_ptr,
    per_sample,
    slots,
    cot_end,
    traj_future_start,
    eos,
    other_eos,
    period,
    DRAFT: tl.constexpr,
    REDUCED: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program s: sample s's rows. PLACES is b − 1, ROWS is W."""
    sample = tl.program_id(0)
    length = tl.load(lengths_ptr + sample)
    base = tl.load(bases_ptr + sample)
    live = tl.load(done_ptr + sample) == 0
    anchor = tl.load(tokens_ptr + sample * per_sample + length - 1)
    row = sample * ROWS
    tl.store(row_tokens_ptr + row, anchor)
    if ROWS > 1:
        room = tl.load(limit_ptr) - length
        chain_length = tl.load(chain_lengths_ptr + sample)
        bad = 0
        if DRAFT:
            for step in tl.static_range(PLACES):
                bad += tl.load(finite_ptr + sample * PLACES + step).to(tl.int32) == 0
        previous = anchor
        opened = live
        given = live
        proposed = 0
        drafted = 0
        offered = 0
        own = live
        for step in tl.static_range(ROWS - 1):
            if step < PLACES:
                chain = tl.load(chains_ptr + sample * PLACES + step)
                pick = chain
                if DRAFT:
                    pick = tl.load(columns_ptr + sample * PLACES + step)
                    if REDUCED:
                        pick = tl.load(ids_ptr + pick, mask=bad == 0, other=0)
            after_end = (previous == cot_end) & (cot_end != _NONE)
            after_period = (previous == period) & (period != _NONE)
            forced = after_end | after_period
            stopped = (previous == eos) | (previous == other_eos) | (previous == traj_future_start)
            if step == 0:
                own = live & ~forced & (room > 1)
                tl.store(failed_ptr + sample, (own & (bad > 0)).to(tl.int64))
                if DRAFT:
                    own = own & (bad == 0)
                else:
                    own = own & (room < 0)  # false, as a value of the loop's type
            listed = step < chain_length
            if step >= PLACES:  # beyond the block, where no chain reaches either
                own = own & (length < 0)  # false, as a value of the loop's type
            token = tl.where(listed, chain, pick)
            token = tl.where(after_end, traj_future_start, tl.where(after_period, cot_end, token))
            opened = opened & (step < room) & (forced | ((room > 1) & (listed | own))) & ~stopped
            own = own & opened & (token == pick)
            given = given & opened & listed & (token == chain)
            tl.store(row_tokens_ptr + row + step + 1, tl.where(opened, token, 0))
            proposed += opened.to(tl.int32)
            drafted += own.to(tl.int32)
            offered += given.to(tl.int32)
            previous = token
        tl.store(proposed_ptr + sample, proposed.to(tl.int64))
        tl.store(drafted_ptr + sample, drafted.to(tl.int64))
        tl.store(offered_ptr + sample, offered.to(tl.int64))
    tl.store(pending_ptr + sample, live.to(tl.int64))
    e = tl.arange(0, BLOCK_E)
    for step in tl.static_range(ROWS):
        position = length - 1 + step
        slot = base + position
        tl.store(row_positions_ptr + row + step, position)
        tl.store(next_positions_ptr + row + step, position + 1)
        tl.store(row_slots_ptr + row + step, slot)
        seen = (e >= base) & (e <= slot)
        tl.store(seen_ptr + (row + step).to(tl.int64) * slots + e, seen.to(tl.uint8), mask=e < slots)


@triton.jit
def accept_kernel(
    tokens_ptr,
    lengths_ptr,
    previous_ptr,
    done_ptr,
    pending_ptr,
    limit_ptr,
    row_tokens_ptr,
    columns_ptr,
    settled_ptr,
    finite_ptr,
    proposed_ptr,
    drafted_ptr,
    offered_ptr,
    failed_ptr,
    report_ptr,
    written_ptr,
    samples,
    per_sample,
    traj_future_start,
    eos,
    other_eos,
    ROWS: tl.constexpr,
):
    """Program s: sample s's walk. ROWS is W."""
    sample = tl.program_id(0)
    length = tl.load(lengths_ptr + sample)
    limit = tl.load(limit_ptr)
    proposed = tl.load(proposed_ptr + sample)
    done = tl.load(done_ptr + sample)
    pending = tl.load(pending_ptr + sample) != 0
    row = sample * ROWS
    walking = pending
    unsettled = pending & (limit < 0)  # false, as a value of the loop's type
    broken = unsettled
    emitted = 0
    accepted = 0
    reason = done
    last = length * 0  # as a value of the tokens' type
    report = report_ptr + sample * (_FIELDS + 2 * ROWS - 1)
    for step in tl.static_range(ROWS):
        token = tl.load(columns_ptr + row + step)
        unsettled = unsettled | (walking & (tl.load(settled_ptr + row + step).to(tl.int32) == 0))
        broken = broken | (walking & (tl.load(finite_ptr + row + step).to(tl.int32) == 0))
        emitted += walking.to(tl.int32)
        after = tl.where(length + emitted >= limit, _AT_LIMIT, 0)
        after = tl.where((token == eos) | (token == other_eos), _AT_EOS, after)
        after = tl.where(token == traj_future_start, _AT_TRAJ, after)
        reason = tl.where(walking, after, reason)
        last = tl.where(walking, token, last)
        tl.store(report + _FIELDS + step, token)
        if step < ROWS - 1:
            proposal = tl.load(row_tokens_ptr + row + step + 1)
            tl.store(report + _FIELDS + ROWS + step, proposal)
            matched = (step < proposed) & (proposal == token)
            accepted += (walking & matched).to(tl.int32)
            walking = walking & matched & (after == 0)
    if pending & ~unsettled:
        for step in tl.static_range(ROWS):
            if step < emitted:
                token = tl.load(columns_ptr + row + step)
                tl.store(tokens_ptr + sample * per_sample + length + step, token)
        tl.store(previous_ptr + sample, length - 1)
        tl.store(lengths_ptr + sample, length + emitted)
        tl.store(written_ptr + samples + sample, length + emitted - (last != traj_future_start).to(tl.int32))
        tl.store(written_ptr + 2 * samples + sample, length + emitted)
        tl.store(done_ptr + sample, reason.to(tl.int64))
        tl.store(pending_ptr + sample, length * 0)  # zero, as a value of the tensor's type
    else:
        emitted = 0
        accepted = 0
        reason = done
    tl.store(report + _EMITTED, emitted.to(tl.int64))
    tl.store(report + _ACCEPTED, accepted.to(tl.int64))
    tl.store(report + _DRAFTED, tl.load(drafted_ptr + sample))
    tl.store(report + _OFFERED, tl.load(offered_ptr + sample))
    tl.store(report + _PROPOSED, proposed)
    tl.store(report + _FAILED, tl.load(failed_ptr + sample))
    tl.store(report + _UNSETTLED, unsettled.to(tl.int64))
    tl.store(report + _BROKEN, broken.to(tl.int64))
    tl.store(report + _ANCHOR, length - 1)


def propose(state: State, marks: Marks, picks: Picks | None, offered: Chains) -> None:
    """As `steps.propose`."""
    nothing = state.tokens
    propose_kernel[(state.samples,)](
        state.tokens,
        state.lengths,
        state.done,
        state.pending,
        state.limit,
        state.bases,
        nothing if picks is None else picks.columns,
        nothing if picks is None else picks.finite,
        nothing if picks is None or picks.token_ids is None else picks.token_ids,
        *offered,
        state.row_tokens,
        state.row_positions,
        state.next_positions,
        state.row_slots,
        state.seen,
        state.proposed,
        state.drafted,
        state.offered,
        state.failed,
        state.per_sample,
        state.slots,
        marks.cot_end,
        marks.traj_future_start,
        marks.eos,
        marks.other_eos,
        marks.period,
        DRAFT=picks is not None,
        REDUCED=picks is not None and picks.token_ids is not None,
        PLACES=state.block - 1,
        ROWS=state.sample_rows,
        BLOCK_E=triton.next_power_of_2(state.slots),
        num_warps=4,
    )


def accept(state: State, marks: Marks, columns: Tensor, settled: Tensor, finite: Tensor) -> None:
    """As `steps.accept`."""
    accept_kernel[(state.samples,)](
        state.tokens,
        state.lengths,
        state.previous,
        state.done,
        state.pending,
        state.limit,
        state.row_tokens,
        columns,
        settled,
        finite,
        state.proposed,
        state.drafted,
        state.offered,
        state.failed,
        state.report,
        state.written,
        state.samples,
        state.per_sample,
        marks.traj_future_start,
        marks.eos,
        marks.other_eos,
        ROWS=state.sample_rows,
        num_warps=1,
    )
