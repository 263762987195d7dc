"""The two steps of a round around the verify pass, on the device: what is proposed, and what is accepted.

The plain form of both, in PyTorch operations that read nothing back; `steps_triton` does the same by kernels,
one launch each. `proposer.unite` and `tree.walk` say in Python what they do; the tests hold all three equal.

Shapes: S sample, b block, W rows of one sample (b, and those of end marks beyond the block), R rows (S·W and
padding), T slots a sample, E slots of the tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.decode.stops import StopReason, StopRules

NONE = -1
"""Stands for a token that there is not."""
MOST_EOS = 2
"""How many ids may end a turn here; Qwen3-VL's generation config has two."""
REASONS = (None, StopReason.TRAJ_FUTURE_START, StopReason.EOS, StopReason.LIMIT)
"""What `State.done` means."""
_COUNTS = ("emitted", "accepted", "drafted", "offered", "proposed")
FIELDS = (*_COUNTS, "failed", "unsettled", "broken", "anchor")
"""A report's columns; after them the W emitted tokens and the W − 1 proposed ones."""


@dataclass(frozen=True)
class Marks:
    """The token ids that matter; NONE for those that a vocabulary lacks or a mode does not use."""

    cot_end: int
    traj_future_start: int
    eos: int
    other_eos: int
    period: int

    @classmethod
    def of(cls, rules: StopRules) -> Marks:
        """Those of the rules, which must be lossless ones."""
        assert rules.mode != "force" and len(rules.eos) <= MOST_EOS
        marks = rules.cot_end is not None and rules.traj_future_start is not None
        hint = marks and rules.mode == "hint" and rules.period is not None
        return cls(
            cot_end=_id(rules.cot_end) if marks else NONE,
            traj_future_start=_id(rules.traj_future_start),
            eos=rules.eos[0],
            other_eos=rules.eos[1] if len(rules.eos) > 1 else NONE,
            period=_id(rules.period) if hint else NONE,
        )


def _id(token: int | None) -> int:
    return NONE if token is None else token


Chains = tuple[Tensor, Tensor]
"""Int64 [S, b − 1] tokens offered after each sample's last one, and [S] how many of them there are."""


@dataclass(frozen=True)
class Picks:
    """A draft's choices for the next pass.

    Attributes:
        columns: int64 [S·(b − 1)], columns of its logits.
        finite: bool [S·(b − 1)], whether the logits of each pick were finite.
        token_ids: the target's id of each column of a reduced head, or None.
    """

    columns: Tensor
    finite: Tensor
    token_ids: Tensor | None


class State:
    """What a round reads and writes, all int64 on the device and never moved.

    Args:
        samples: S.
        block: b; 1 decodes autoregressively.
        sample_rows: W; left out, b.
        width: R.
        per_sample: T.
        slots: E.
        device: where.

    Attributes:
        tokens: [S, T] the generated tokens.
        lengths: [S] how many of them there are.
        previous: [S] the anchor's position in the pass before.
        done: [S] index into REASONS.
        pending: [S] 1 from a proposal until it has been walked.
        limit: [1] the most tokens of a sample.
        bases: [S] each sample's first slot.
        written: [3, S] for the action expert: its first slot, the tokens that it reads (a last one that is
            not `<|traj_future_start|>` it does not), and how many there are.
        row_tokens: [R].
        row_positions: [R].
        row_slots: [R].
        next_positions: [R] the position that each row's logits predict.
        seen: uint8 [R, E].
        proposed: [S] how many tokens are proposed.
        drafted: [S] how many of those are the draft's own, from the first on.
        offered: [S] how many of those are of the chain that stood before the draft's, from the first on.
        listed: what the host offers.
        failed: [S] 1 where the draft's logits were not finite.
        report: [S, len(FIELDS) + 2W − 1].
    """

    def __init__(
        self,
        *,
        samples: int,
        block: int,
        sample_rows: int | None = None,
        width: int,
        per_sample: int,
        slots: int,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.samples, self.block, self.sample_rows = samples, block, sample_rows or block
        self.per_sample, self.slots = per_sample, slots
        self.tokens = zeros(samples, per_sample)
        self.lengths, self.previous, self.done = zeros(samples), zeros(samples), zeros(samples)
        self.pending, self.limit, self.bases = zeros(samples), zeros(1), zeros(samples)
        self.written = zeros(3, samples)
        self.row_tokens, self.row_positions, self.row_slots = zeros(width), zeros(width), zeros(width)
        self.next_positions = zeros(width)
        self.seen = torch.zeros(width, slots, dtype=torch.uint8, device=device)
        self.proposed, self.drafted, self.failed = zeros(samples), zeros(samples), zeros(samples)
        self.offered = zeros(samples)
        self.listed: Chains = (zeros(samples, max(1, block - 1)), zeros(samples))
        self.report = zeros(samples, len(FIELDS) + 2 * self.sample_rows - 1)
        self.row_slots.fill_(slots)
        self.lengths.fill_(1)

    def begin(self, first: Tensor, bases: Tensor, limit: int, marks: Marks) -> None:
        """Start texts.

        Args:
            first: int64 [S], each one's first token.
            bases: int64 [S].
            limit: the most tokens.
            marks: decide whether a text ends with its first token.
        """
        self.tokens[:, 0] = first
        self.lengths.fill_(1)
        self.previous.zero_()
        self.pending.zero_()
        self.limit.fill_(limit)
        self.bases.copy_(bases)
        self.done.copy_(_reason(first, self.lengths, self.limit, marks))
        self.note(marks)

    def note(self, marks: Marks) -> None:
        """Write down how far the texts have come."""
        last = self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]
        read = self.lengths - (last != marks.traj_future_start).long()
        torch.stack((self.bases, read, self.lengths), out=self.written)


def _is_eos(token: Tensor, marks: Marks) -> Tensor:
    return (token == marks.eos) | (token == marks.other_eos)


def _reason(token: Tensor, length: Tensor, limit: Tensor, marks: Marks) -> Tensor:
    """Index into REASONS after `token`."""
    reason = (length >= limit).long() * REASONS.index(StopReason.LIMIT)
    reason = torch.where(_is_eos(token, marks), REASONS.index(StopReason.EOS), reason)
    ended = token == marks.traj_future_start
    return torch.where(ended, REASONS.index(StopReason.TRAJ_FUTURE_START), reason)


def propose(state: State, marks: Marks, picks: Picks | None, offered: Chains) -> None:
    """Fill the rows of the next pass: each sample's anchor, and what is proposed after it.

    That is a chain: what others offer, and the draft's picks as long as these agree with it, or from the
    start where nothing else is offered. Beyond the block only what a rule knows is proposed.

    Args:
        state: is written.
        marks: the rules of `StopRules.forced`.
        picks: the draft's; None without one.
        offered: what others offer.
    """
    samples, count = state.samples, state.sample_rows
    chains, chain_lengths = offered
    anchor = state.tokens.gather(1, state.lengths[:, None] - 1)[:, 0]
    open_ = state.done == 0
    room = state.limit - state.lengths
    tokens = torch.zeros(samples, count, dtype=torch.int64, device=anchor.device)
    tokens[:, 0] = anchor
    proposed, drafted, taken, failed = (torch.zeros_like(anchor) for _ in range(4))
    previous, given = anchor, open_
    own = open_ & (_forced(anchor, marks) == NONE) & (room > 1)
    if picks is None:
        sound, ids = torch.zeros_like(open_), chains
    else:
        sound = picks.finite.view(samples, -1).all(1)
        ids = picks.columns if picks.token_ids is None else picks.token_ids[picks.columns]
        ids = ids.view(samples, -1)
        failed = (own & ~sound).long()
    own = own & sound
    for step in range(count - 1):
        forced, listed = _forced(previous, marks), step < chain_lengths
        if step < state.block - 1:
            chain, pick = chains[:, step], ids[:, step]
        else:  # beyond the block, where no chain reaches either
            own = torch.zeros_like(own)
        stopped = _is_eos(previous, marks) | (previous == marks.traj_future_start)
        # With room for one token nothing is asked: the target's own fills it.
        known = (forced != NONE) | ((room > 1) & (listed | own))
        open_ = open_ & (step < room) & known & ~stopped
        token = torch.where(forced != NONE, forced, torch.where(listed, chain, pick))
        own = own & open_ & (token == pick)
        given = given & open_ & listed & (token == chain)
        tokens[:, step + 1] = torch.where(open_, token, 0)
        proposed, drafted, taken = proposed + open_, drafted + own, taken + given
        previous = token
    state.proposed.copy_(proposed)
    state.drafted.copy_(drafted)
    state.offered.copy_(taken)
    state.failed.copy_(failed)
    state.pending.copy_(state.done == 0)
    rows = samples * count
    positions = state.lengths[:, None] - 1 + torch.arange(count, device=anchor.device)
    slots = (state.bases[:, None] + positions).flatten()
    state.row_tokens[:rows] = tokens.flatten()
    state.row_positions[:rows] = positions.flatten()
    state.next_positions[:rows] = positions.flatten() + 1
    state.row_slots[:rows] = slots
    at = torch.arange(state.slots, device=anchor.device)
    first = state.bases.repeat_interleave(count, output_size=rows)
    state.seen[:rows] = ((at >= first[:, None]) & (at <= slots[:, None])).to(torch.uint8)


def _forced(previous: Tensor, marks: Marks) -> Tensor:
    """The token that always follows, or NONE."""
    nothing = torch.full_like(previous, NONE)
    after = torch.where(previous == marks.period, marks.cot_end, nothing) if marks.period != NONE else nothing
    if marks.cot_end == NONE:
        return after
    return torch.where(previous == marks.cot_end, marks.traj_future_start, after)


def accept(state: State, marks: Marks, columns: Tensor, settled: Tensor, finite: Tensor) -> None:
    """Let each pending sample walk its chain along the target's choices, and report.

    A sample with an unsettled choice on its way stays pending.

    Args:
        state: is written.
        marks: where texts end.
        columns: int64 [R], the target's choice after each row.
        settled: bool [R], whether the choice is known.
        finite: bool [R], whether the row's logits are finite; a walk over one that has others is `broken`.
    """
    samples, count = state.samples, state.sample_rows
    rows = samples * count
    choices = columns[:rows].view(samples, count)
    known = settled[:rows].view(samples, count)
    sound = finite[:rows].view(samples, count)
    proposals = state.row_tokens[:rows].view(samples, count)[:, 1:]
    walking = state.pending != 0
    emitted, accepted = torch.zeros_like(state.lengths), torch.zeros_like(state.lengths)
    reason, unsettled, broken = state.done.clone(), torch.zeros_like(walking), torch.zeros_like(walking)
    for step in range(count):
        token = choices[:, step]
        unsettled = unsettled | (walking & ~known[:, step])
        broken = broken | (walking & ~sound[:, step])
        emitted = emitted + walking
        after = _reason(token, state.lengths + emitted, state.limit, marks)
        reason = torch.where(walking, after, reason)
        matched = torch.zeros_like(walking)
        if step < count - 1:
            matched = (step < state.proposed) & (proposals[:, step] == token)
        accepted = accepted + (walking & matched)
        walking = walking & matched & (after == 0)
    stays = (state.pending == 0) | unsettled
    emitted, accepted = emitted.masked_fill(stays, 0), accepted.masked_fill(stays, 0)
    reason = torch.where(stays, state.done, reason)
    steps = torch.arange(count, device=choices.device)
    places = (state.lengths[:, None] + steps).clamp_max(state.per_sample - 1)
    kept = torch.where(steps < emitted[:, None], choices, state.tokens.gather(1, places))
    state.tokens.scatter_(1, places, kept)
    counts = (emitted, accepted, state.drafted, state.offered, state.proposed)
    flags = (state.failed, unsettled.long(), broken.long())
    head = torch.stack((*counts, *flags, state.lengths - 1), dim=1)
    state.report.copy_(torch.cat((head, choices, proposals), dim=1))
    state.previous.copy_(torch.where(stays, state.previous, state.lengths - 1))
    state.lengths.add_(emitted)
    state.done.copy_(reason)
    state.pending.copy_(state.pending * unsettled)
    state.note(marks)
