"""The simulated acceptance length: what greedy decoding with the draft would accept, without the target.

The target's greedy response is known. The walk begins at its first token, which the prompt's own pass
gives. There the draft predicts a block; the k leading predictions that equal the response's next tokens would
be accepted, the token after them is the target's own, and the walk goes on k + 1 tokens further. Every block
is one verify pass. The acceptance length is tokens after the first over passes, pooled over responses; rules
that add the tokens of a CoC's end to a proposal can only better it.

Shapes: S responses still walking, B masks of a block, V vocabulary of the draft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.data import BlockBatch, BlockData, Blocks

_BATCH = 256


@dataclass(frozen=True)
class AcceptanceCounts:
    """Counts of decoding; they add up over responses and processes.

    Attributes:
        tokens: response tokens after the first.
        passes: verify passes, or how many are to be expected.
    """

    tokens: int
    passes: float

    @property
    def length(self) -> float:
        """Tokens a pass."""
        return self.tokens / self.passes if self.passes else 0.0


@dataclass(frozen=True)
class Walk:
    """How a response was decoded.

    Attributes:
        clip_id: the clip it was written on.
        token_ids: its tokens.
        anchors: the place of each pass's known token, from 0 on.
    """

    clip_id: str
    token_ids: tuple[int, ...]
    anchors: tuple[int, ...]


def counts_of(walks: Iterable[Walk]) -> AcceptanceCounts:
    """Tokens and passes of several responses."""
    walks = list(walks)
    # A block never passes the end: only labels are accepted, and no token of the target's follows the last.
    tokens = sum(max(0, len(walk.token_ids) - 1) for walk in walks)
    return AcceptanceCounts(tokens, passes=sum(len(walk.anchors) for walk in walks))


@torch.no_grad()
def simulate(
    draft: DFlashDraft, data: BlockData, masked_ids: range, responses: Tensor | None = None
) -> list[Walk]:
    """Walk through responses with a bound draft.

    Args:
        draft: the draft.
        data: the responses, which count as what greedy decoding writes.
        masked_ids: trajectory ids, which are never proposed.
        responses: walk only these (int64 indices); all where it is left out.
    """
    if responses is None:
        responses = torch.arange(len(data))
    columns_V = head_columns(draft)

    def accepted(blocks: Blocks) -> Tensor:
        batch = data.batch(Blocks(responses[blocks.responses], blocks.positions)).to(draft.fc.weight.device)
        predicted = columns_V[labelled_logits(draft, batch, masked_ids).argmax(-1)]
        return accepted_prefix(predicted, batch.labels, batch.labelled).cpu()

    was_training = draft.training
    draft.eval()
    anchors = walk_responses(data.lengths[responses], accepted)
    draft.train(was_training)
    samples = [data.samples[index] for index in responses.tolist()]
    return [
        Walk(sample.clip_id, sample.token_ids, tuple(own))
        for sample, own in zip(samples, anchors, strict=True)
    ]


def head_columns(draft: DFlashDraft) -> Tensor:
    """The target's id of each column of a draft's logits, int64 [V]."""
    if draft.token_ids is not None:
        return draft.token_ids
    return torch.arange(len(draft.head), device=draft.head.device)


def labelled_logits(
    draft: DFlashDraft, batch: BlockBatch, masked_ids: range, wanted_R: Tensor | None = None
) -> Tensor:
    """The logits of a batch's masks, each place's picks before it being the labels; masked ids have −inf.

    Along an accepted prefix the picks are the labels, and after it nothing counts.

    Args:
        draft: bound, on the batch's device.
        batch: the blocks.
        masked_ids: ids that are never proposed.
        wanted_R: as in `DFlashDraft.forward`.

    Returns:
        [S, B, V], or of the wanted masks [R, V].
    """
    hidden = draft(batch.states, batch.context_lengths, batch.anchors, batch.entries, wanted_R)
    logits = torch.nn.functional.linear(hidden, draft.head)
    if draft.previous is not None:
        codes = draft.shift_codes(hidden.flatten(0, -2), batch.anchors, batch.labels, wanted_R)
        logits = logits + draft.previous.out(codes).view_as(logits)
    columns_V = head_columns(draft)
    masked_V = (columns_V >= masked_ids.start) & (columns_V < masked_ids.stop)
    return logits.masked_fill(masked_V, -torch.inf)


def walk_responses(lengths: Tensor, accepted: Callable[[Blocks], Tensor]) -> list[list[int]]:
    """The places of the passes' known tokens in each response.

    Args:
        lengths: int64 [responses], tokens of each.
        accepted: for some blocks, the accepted drafted tokens of each, int64 [S].
    """
    position = torch.zeros_like(lengths)
    last = lengths - 1
    found: list[list[int]] = [[] for _ in range(len(lengths))]
    while bool((walking := position < last).any()):
        responses = walking.nonzero()[:, 0]
        for response, anchor in zip(responses.tolist(), position[responses].tolist(), strict=True):
            found[response].append(anchor)
        for few in responses.split(_BATCH):
            position[few] += accepted(Blocks(few, position[few])) + 1
    return found


def accepted_prefix(predicted_SB: Tensor, labels_SB: Tensor, labelled_SB: Tensor) -> Tensor:
    """How many leading predictions equal their labels; int64 [S]. A mask without a label ends the prefix."""
    return ((predicted_SB == labels_SB) & labelled_SB).long().cumprod(dim=1).sum(dim=1)
