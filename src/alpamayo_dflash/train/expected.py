"""The acceptance length to expect at a temperature, from responses that were drawn at it, without the target.

Draft and target choose with the same Gumbel noise g of a position: the arg max of log q + g and of log p + g.
Given that the target chose x, the draft does so too with probability

    1 / Σ_y max(p_y, q_y · p_x / q_x)

since both choose x where g_y − g_x ≤ min(log p_x/p_y, log q_x/q_y) for every y, which has the probability
1 / Σ_y max(p_y/p_x, q_y/q_x) (as for one distribution alone: Maddison et al. 2014, "A* sampling"), and the
target chooses x with p_x. Every position has noise of its own. So a drawn response says, for each place of
each block, how likely the draft's pick is to be kept, and the passes from its first token on follow by going
backwards: from an anchor a, one pass and those from a + k + 1, where k picks are kept. `accept.simulate`
counts what a greedy text happens to be given; this is an expectation, at the temperature of decoding. Rules
that add the tokens of a CoC's end to a proposal can only better it.

Shapes: S blocks, N those at every anchor of some responses, A those of one, B masks of a block, R label rows,
V vocabulary of the draft, k stored logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alpamayo_dflash.common.nucleus import cut
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.accept import AcceptanceCounts, labelled_logits
from alpamayo_dflash.train.data import BlockData, Blocks
from alpamayo_dflash.train.loss import head_rows

MOST_RESPONSES = 2048
"""Responses that are looked at; more would not make the mean much surer."""
_BATCH = 64


@torch.no_grad()
def expect(draft: DFlashDraft, data: BlockData, responses: Tensor | None = None) -> AcceptanceCounts:
    """What decoding is expected to accept at the temperature that some responses were drawn at.

    Args:
        draft: bound.
        data: the drawn responses, all at one temperature, with the target's stored logits; tokens that are
            left out of these are not proposed.
        responses: only these (int64 indices); all where it is left out.
    """
    if responses is None:
        responses = torch.arange(len(data))
    blocks, lengths = data.blocks(responses.tolist()), data.lengths[responses]
    was_training = draft.training
    draft.eval()
    kept = [_kept(draft, data, blocks[start : start + _BATCH]) for start in range(0, len(blocks), _BATCH)]
    draft.train(was_training)
    passes = expected_passes(torch.cat(kept), lengths) if kept else torch.zeros(0)
    return AcceptanceCounts(int((lengths - 1).clamp_min(0).sum()), float(passes.sum()))


def _kept(draft: DFlashDraft, data: BlockData, blocks: Blocks) -> Tensor:
    """The probability that each pick is kept if those before it in its block are; 0 where there is no label.

    Returns:
        float64 [S, B], on the host.
    """
    batch = data.batch(blocks).to(draft.fc.weight.device)
    logits_RV = labelled_logits(draft, batch, data.unlabelled, batch.label_rows)
    assert batch.teacher_logits is not None and batch.teacher_ids is not None
    tokens = batch.labels.flatten()[batch.label_rows, None], batch.teacher_ids
    first = data.samples[0]
    target_Rk, draft_RV = (
        cut((logits / first.temperature).softmax(-1), first.top_p)
        for logits in (batch.teacher_logits, logits_RV)
    )
    draft_R1, draft_Rk = (_of(some, draft_RV, draft.token_ids) for some in tokens)
    target_R = (target_Rk * (tokens[0] == tokens[1])).sum(1)
    agree_R = agreement(target_Rk, draft_Rk, target_R, draft_R1[:, 0])
    found = torch.zeros(batch.labelled.shape, dtype=torch.float64)
    found.view(-1)[batch.label_rows.cpu()] = agree_R.double().cpu()
    return found


def _of(tokens: Tensor, draft_RV: Tensor, kept_V: Tensor | None) -> Tensor:
    """The draft's probabilities of some tokens, of their shape; 0 of those that its head has no row for."""
    if kept_V is None:
        return draft_RV.gather(1, tokens)
    rows, inside = head_rows(tokens, kept_V)
    return draft_RV.gather(1, rows) * inside


def agreement(target_Rk: Tensor, draft_Rk: Tensor, target_R: Tensor, draft_R: Tensor) -> Tensor:
    """The probability [R] that the draft picks what the target chose, with the same noise.

    Args:
        target_Rk: the target's probabilities; all other tokens have none. A token without one may stand there
            several times, as stored logits that are left out do.
        draft_Rk: the draft's, of the same tokens.
        target_R: the target's, of the token that it chose.
        draft_R: the draft's, of that token.
    """
    ratio_R = target_R / draft_R  # infinite where the draft cannot pick it, and then the answer is 0
    draft_Rk = draft_Rk * (target_Rk > 0)
    either_Rk = target_Rk.maximum(draft_Rk * ratio_R[:, None])
    elsewhere_R = (1 - draft_Rk.sum(1)).clamp_min(0) * ratio_R
    return torch.where(draft_R > 0, 1 / (either_Rk.sum(1) + elsewhere_R), 0.0)


def expected_passes(kept_NB: Tensor, lengths: Tensor) -> Tensor:
    """The verify passes to expect of each response.

    Args:
        kept_NB: the probability that each pick of each block is kept if those before it are, response by
            response and anchor by anchor; 0 beyond the response's end.
        lengths: int64 [responses], tokens of each.

    Returns:
        float64 [responses].
    """
    found = kept_NB.new_zeros(len(lengths))
    for response, kept_AB in enumerate(kept_NB.split((lengths - 1).clamp_min(0).tolist())):
        reached = torch.nn.functional.pad(kept_AB.cumprod(1), (1, 0), value=1.0)
        exactly = reached - torch.nn.functional.pad(reached[:, 1:], (0, 1))  # so many picks are kept
        count, counts = exactly.shape
        passes = kept_NB.new_zeros(count + counts)
        for anchor in reversed(range(count)):
            passes[anchor] = 1 + exactly[anchor] @ passes[anchor + 1 : anchor + 1 + counts]
        found[response] = passes[0]
    return found
