"""The loss of a batch of blocks: the terms of `terms.LOSSES` over its label rows, and weights of positions.

Shapes: S blocks, B masks of a block (b−1), R label rows (the masks that have a label, block by block),
V vocabulary (rows of the draft's head), k stored logits, C hidden, T terms, r rank of a shift.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.config import TrainConfig, decay_gamma
from alpamayo_dflash.train.data import BlockBatch
from alpamayo_dflash.train.terms import CROSS_ENTROPY, LabelRows, Term

CHUNK_ELEMENTS = 1 << 26
"""Vocabulary logits computed at once: 256 MiB in float32."""


class BlockLoss(nn.Module):
    """The draft with its loss, as one module for DDP.

    Attributes:
        terms: what is computed: cross-entropy in any case, which logs show and D-PACE needs, then the others
            of the config's mix.
    """

    def __init__(self, draft: DFlashDraft, config: TrainConfig) -> None:
        super().__init__()
        self.draft = draft
        self.options = config
        self.terms = (CROSS_ENTROPY, *(term for term in config.terms if term is not CROSS_ENTROPY))
        block_size = draft.config.block_size
        gamma = decay_gamma(block_size, config.prefix_weight_gamma)
        self._decay_B = decay_weights(block_size - 1, gamma).to(draft.head.device)

    def forward(self, batch: BlockBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Weighted sums over the batch's label rows.

        Labels that a reduced head has no row for get no weight in cross-entropy, and rows of which it keeps
        none of the target's stored logits none in the other terms; so each has a sum of weights of its own.

        Returns:
            the weighted sum of each of `terms`, with gradient, and as one report, detached [2·T + 1]: the
            sum of each term's weights, each term's weighted sum, and how many labels have no row of the head.
        """
        draft = self.draft
        rows_R = batch.label_rows
        hidden_RC = draft(batch.states, batch.context_lengths, batch.anchors, batch.entries, rows_R)
        teacher = None
        if batch.teacher_logits is not None and batch.teacher_ids is not None:
            teacher = (batch.teacher_logits, batch.teacher_ids)
        labels_R = batch.labels.flatten()[rows_R]
        if self.options.labels == "argmax":
            assert teacher is not None
            labels_R = best_stored(*teacher)
        has_label_R = has_teacher_R = torch.ones_like(labels_R, dtype=torch.bool)
        if draft.token_ids is not None:
            labels_R, has_label_R = head_rows(labels_R, draft.token_ids)
            if teacher is not None:
                teacher, has_teacher_R = reduced_teacher(teacher, draft.token_ids)
        losses = row_losses(
            hidden_RC,
            draft.head,
            labels_R,
            teacher,
            terms=self.terms,
            temperature=self.options.kl_temperature,
            shift=_shift(draft, hidden_RC, batch),
        )
        # A token that the draft cannot propose has an infinite cross-entropy, and D-PACE is to know that.
        weight_R = self._weights(losses[0].detach().masked_fill(~has_label_R, torch.inf), batch)
        counted = [has_teacher_R if term.needs_teacher else has_label_R for term in self.terms]
        weights = [weight_R * counted_R for counted_R in counted]
        sums = tuple((mine_R * loss_R).sum() for mine_R, loss_R in zip(weights, losses, strict=True))
        masses = [mine_R.sum() for mine_R in weights]
        outside = (~has_label_R).sum().to(sums[0])
        return sums, torch.stack((*masses, *(total.detach() for total in sums), outside))

    def _weights(self, ce_R: Tensor, batch: BlockBatch) -> Tensor:
        rows_R, labelled_SB = batch.label_rows, batch.labelled
        if self.options.position_weights == "decay":
            return self._decay_B[rows_R % len(self._decay_B)]
        ce_SB = torch.zeros(labelled_SB.shape, device=ce_R.device)
        ce_SB.view(-1)[rows_R] = ce_R
        return dpace_weights(ce_SB, labelled_SB, self.options.dpace_alpha).flatten()[rows_R]


def _shift(draft: DFlashDraft, hidden_RC: Tensor, batch: BlockBatch) -> tuple[Tensor, Tensor] | None:
    """What a head on previous picks adds to the masks' logits, as `row_losses` takes it."""
    if draft.previous is None:
        return None
    codes_Rr = draft.shift_codes(hidden_RC, batch.anchors, batch.labels, batch.label_rows)
    return codes_Rr, draft.previous.out.weight


def decay_weights(num_masks: int, gamma: float) -> Tensor:
    """Weights exp(−(i−1)/γ) of a block's masks i = 1 … [B] (DFlash)."""
    return torch.exp(-torch.arange(num_masks, dtype=torch.float32) / gamma)


def dpace_weights(ce_SB: Tensor, labelled_SB: Tensor, alpha: float) -> Tensor:
    """Weights of D-PACE: what each mask does to the expected accepted prefix.

    With q_i = (1−α)·exp(−CE_i) + α the weight of mask j is Σ_{m≥j} Π_{i≤m} q_i, over labelled masks m.

    Returns:
        [S, B], detached, 0 where there is no label.
    """
    q_SB = (1 - alpha) * torch.exp(-ce_SB.detach().float()) + alpha
    prefix_SB = q_SB.where(labelled_SB, torch.ones_like(q_SB)).cumprod(dim=1) * labelled_SB
    return prefix_SB.flip(1).cumsum(1).flip(1) * labelled_SB


def best_stored(logits_Rk: Tensor, ids_Rk: Tensor) -> Tensor:
    """The target's best token of each row among its stored logits, int64 [R]; −inf leaves a token out."""
    return ids_Rk.gather(-1, logits_Rk.argmax(-1, keepdim=True))[:, 0]


def head_rows(token_ids: Tensor, kept_V: Tensor) -> tuple[Tensor, Tensor]:
    """Where tokens stand in a reduced head.

    Args:
        token_ids: the target's ids, of any shape.
        kept_V: ascending ids that the head keeps.

    Returns:
        the head's rows, 0 for a token that has none, and whether it has one; both of `token_ids`' shape.
    """
    rows = torch.searchsorted(kept_V, token_ids).clamp_max(len(kept_V) - 1)
    inside = kept_V[rows] == token_ids
    return rows * inside, inside


def reduced_teacher(teacher: tuple[Tensor, Tensor], kept_V: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The target's stored logits over a reduced head: tokens outside it are left out of their distribution.

    Args:
        teacher: the target's logits [R, k] and their ids [R, k].
        kept_V: ascending ids that the head keeps.

    Returns:
        logits [R, k] and rows of the head [R, k], and bool [R]: whether any of the k is kept. Rows of which
        none is hold numbers that mean nothing and must get no weight.
    """
    rows_Rk, inside_Rk = head_rows(teacher[1], kept_V)
    logits_Rk = teacher[0].masked_fill(~inside_Rk, -torch.inf)
    some_R = (logits_Rk > -torch.inf).any(-1)
    return (logits_Rk.masked_fill(~some_R[:, None], 0.0), rows_Rk), some_R


def row_losses(
    hidden_RC: Tensor,
    head_VC: Tensor,
    labels_R: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    *,
    terms: Sequence[Term],
    temperature: float = 1.0,
    shift: tuple[Tensor, Tensor] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, ...]:
    """The losses of each label row.

    Vocabulary logits exist for `chunk_elements` values at a time; where that takes more than one chunk they
    are computed again for the gradient.

    Args:
        hidden_RC: draft states after its final norm.
        head_VC: the head.
        labels_R: rows of the head: token ids where it is whole.
        teacher: the target's logits [R, k] (−inf leaves a token out) and their rows of the head [R, k]; None
            where no term needs them.
        terms: which losses.
        temperature: of kl.
        shift: codes [R, r] and their output weights [V, r], whose product is added to the logits.
        chunk_elements: see above.

    Returns:
        [R] for each term, float32.
    """
    count = hidden_RC.shape[0]
    rows = max(1, chunk_elements // head_VC.shape[0])
    chunk = functools.partial(_chunk_losses, terms=terms, temperature=temperature)
    if count <= rows:
        return chunk(hidden_RC, head_VC, labels_R, teacher, shift)
    parts = []
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        few = None if teacher is None else (teacher[0][part], teacher[1][part])
        moved = None if shift is None else (shift[0][part], shift[1])
        arguments = (hidden_RC[part], head_VC, labels_R[part], few, moved)
        parts.append(checkpoint(chunk, *arguments, use_reentrant=False))
    return tuple(torch.cat(losses) for losses in zip(*parts, strict=True))


def _chunk_losses(
    hidden_RC: Tensor,
    head_VC: Tensor,
    labels_R: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    shift: tuple[Tensor, Tensor] | None,
    *,
    terms: Sequence[Term],
    temperature: float,
) -> tuple[Tensor, ...]:
    logits_RV = functional.linear(hidden_RC, head_VC).float()
    if shift is not None:
        logits_RV = logits_RV + functional.linear(*shift).float()
    rows = LabelRows(logits_RV, labels_R, teacher, temperature)
    return tuple(term.rows(rows) for term in terms)
