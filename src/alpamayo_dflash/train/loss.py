"""The loss of a batch of blocks: the terms of `terms.LOSSES` over its label rows, and weights of positions.

Shapes: S blocks, B masks of a block (b−1), R label rows (the masks that have a label, block by block),
V vocabulary (rows of the draft's head), k stored logits, C hidden, T terms, r rank of a shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.config import TrainConfig, decay_gamma
from alpamayo_dflash.train.data import BlockBatch
from alpamayo_dflash.train.loss_fused import Part, Sums, parts_of, sums_with_gradients
from alpamayo_dflash.train.terms import CROSS_ENTROPY, LabelRows, Term

CHUNK_ELEMENTS = 1 << 27
"""Vocabulary logits computed at once: 512 MiB in float32, and about five times that with their gradients."""
_HEAD_MULTIPLE = 64


@dataclass(frozen=True)
class RowTargets:
    """What the label rows of some blocks are taught.

    Attributes:
        labels_R: rows of the head: token ids where it is whole.
        has_label_R: bool, whether the label has a row of the head.
        teacher: the target's logits [R, k] and their rows of the head [R, k]; None where nothing needs them.
        has_teacher_R: bool, whether the head keeps any of the k.
        rows_R: int64, the rows' places among the S·B masks.
        labelled_SB: bool.
    """

    labels_R: Tensor
    has_label_R: Tensor
    teacher: tuple[Tensor, Tensor] | None
    has_teacher_R: Tensor
    rows_R: Tensor
    labelled_SB: Tensor

    def part(self, part: Part) -> RowTargets:
        """Those of some of the blocks."""
        teacher = self.teacher
        return RowTargets(
            self.labels_R[part.rows],
            self.has_label_R[part.rows],
            None if teacher is None else (teacher[0][part.rows], teacher[1][part.rows]),
            self.has_teacher_R[part.rows],
            self.rows_R[part.rows] - part.blocks.start * self.labelled_SB.shape[1],
            self.labelled_SB[part.blocks],
        )


class BlockLoss(nn.Module):
    """The draft with its loss, as one module for DDP.

    Attributes:
        terms: what is computed: cross-entropy in any case, which logs show and D-PACE needs, then the others
            of the config's mix.
    """

    def __init__(self, draft: DFlashDraft, config: TrainConfig, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        """Set up.

        Args:
            draft: bound, on the device where it is trained.
            config: the options.
            chunk_elements: vocabulary logits that exist at a time. Where the batch has no more, plain
                autograd takes the gradient; else `loss_fused` does, whose sums and gradients are the same.
        """
        super().__init__()
        self.draft = draft
        self.options = config.loss
        self.terms = (CROSS_ENTROPY, *(term for term in config.loss.terms if term is not CROSS_ENTROPY))
        block_size = draft.config.block_size
        gamma = decay_gamma(block_size, config.loss.prefix_weight_gamma)
        self._decay_B = decay_weights(block_size - 1, gamma).to(draft.head.device)
        self._chunk_elements = chunk_elements
        # A head that is not trained is cast once; autocast would cast it each time that it is used.
        once = config.run.dtype == "bfloat16" and not draft.head.requires_grad
        self._cast = padded_head(draft.head.bfloat16()) if once else None

    def forward(self, batch: BlockBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Weighted sums over the batch's label rows.

        Labels that a reduced head has no row for get no weight in cross-entropy, and rows of which it keeps
        none of the target's stored logits none in the other terms; so each has a sum of weights of its own.

        Returns:
            the weighted sum of each of `terms`, with gradient where the term is in the mix; and one report,
            detached [2·T + 1]: the sum of each term's weights, each term's weighted sum, and how many labels
            have no row of the head.
        """
        draft = self.draft
        head, bias = (draft.head, None) if self._cast is None else self._cast
        hidden_RC = draft(batch.states, batch.context_lengths, batch.anchors, batch.entries, batch.label_rows)
        targets = self._targets(batch)
        by_row: tuple[Tensor, ...] = (hidden_RC,)
        shared: tuple[Tensor, ...] = (head,)
        if draft.previous is not None:
            codes_Rr = draft.shift_codes(hidden_RC, batch.anchors, batch.labels, batch.label_rows)
            out = draft.previous.out.weight
            by_row = (hidden_RC, codes_Rr)
            shared = (head, functional.pad(out, (0, 0, 0, len(head) - len(out))))

        def sums_of(part: Part, by_row: Sequence[Tensor], shared: Sequence[Tensor]) -> Sums:
            return self._sums(targets.part(part), by_row, shared, bias)

        parts = parts_of(batch.row_ends, max(1, self._chunk_elements // len(head)))
        if len(parts) == 1:
            sums, masses = self._sums(targets, by_row, shared, bias)
        else:
            graded = [place for place, term in enumerate(self.terms) if term in self.options.terms]
            sums, masses = sums_with_gradients(sums_of, parts, by_row=by_row, shared=shared, graded=graded)
        outside = (~targets.has_label_R).sum().to(masses)
        return sums, torch.stack((*masses, *(total.detach() for total in sums), outside))

    def _targets(self, batch: BlockBatch) -> RowTargets:
        """The labels, and the target's stored logits, in rows of the head."""
        teacher = None
        if batch.teacher_logits is not None and batch.teacher_ids is not None:
            teacher = (batch.teacher_logits, batch.teacher_ids)
        labels_R = batch.labels.flatten()[batch.label_rows]
        if self.options.labels == "argmax":
            assert teacher is not None
            labels_R = best_stored(*teacher)
        has_label_R = has_teacher_R = torch.ones_like(labels_R, dtype=torch.bool)
        kept_V = self.draft.token_ids
        if kept_V is not None:
            labels_R, has_label_R = head_rows(labels_R, kept_V)
            if teacher is not None:
                teacher, has_teacher_R = reduced_teacher(teacher, kept_V)
        return RowTargets(labels_R, has_label_R, teacher, has_teacher_R, batch.label_rows, batch.labelled)

    def _sums(
        self, targets: RowTargets, by_row: Sequence[Tensor], shared: Sequence[Tensor], bias: Tensor | None
    ) -> Sums:
        """The weighted sums of whole blocks.

        Args:
            targets: of their rows.
            by_row: the draft's states [R, C], and with a head on previous picks the codes [R, r].
            shared: the head [V, C], and then that one's output weights [V, r].
            bias: see `row_losses`.
        """
        losses = row_losses(
            by_row[0],
            shared[0],
            targets.labels_R,
            targets.teacher,
            terms=self.terms,
            temperature=self.options.kl_temperature,
            shift=(by_row[1], shared[1]) if len(by_row) > 1 else None,
            bias=bias,
        )
        # A token that the draft cannot propose has an infinite cross-entropy, and D-PACE is to know that.
        weight_R = self._weights(losses[0].detach().masked_fill(~targets.has_label_R, torch.inf), targets)
        counted = [
            targets.has_teacher_R if term.needs_teacher else targets.has_label_R for term in self.terms
        ]
        weights = [weight_R * counted_R for counted_R in counted]
        sums = tuple((mine_R * loss_R).sum() for mine_R, loss_R in zip(weights, losses, strict=True))
        return sums, torch.stack([mine_R.sum() for mine_R in weights])

    def _weights(self, ce_R: Tensor, targets: RowTargets) -> Tensor:
        rows_R, labelled_SB = targets.rows_R, targets.labelled_SB
        if self.options.position_weights == "decay":
            return self._decay_B[rows_R % len(self._decay_B)]
        ce_SB = torch.zeros(labelled_SB.shape, device=ce_R.device)
        ce_SB.view(-1)[rows_R] = ce_R
        return dpace_weights(ce_SB, labelled_SB, self.options.dpace_alpha).flatten()[rows_R]


def padded_head(head_VC: Tensor) -> tuple[Tensor, Tensor]:
    """The head with rows added up to a multiple of 64, and the bias that keeps them out of every sum.

    Alpamayo's vocabulary of 155,697 or 155,698 tokens is no multiple of 8, and for such rows cuBLAS has only
    the kernels of cards from before Hopper.

    Returns:
        [V + n, C], and [V + n]: 0, and for the rows added minus infinity.
    """
    rows = -len(head_VC) % _HEAD_MULTIPLE
    bias = head_VC.new_zeros(len(head_VC))
    return functional.pad(head_VC, (0, 0, 0, rows)), functional.pad(bias, (0, rows), value=-torch.inf)


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
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The losses of each label row.

    Args:
        hidden_RC: draft states after its final norm.
        head_VC: the head; products are of its dtype.
        labels_R: rows of the head: token ids where it is whole.
        teacher: the target's logits [R, k] (−inf leaves a token out) and their rows of the head [R, k]; None
            where no term needs them.
        terms: which losses.
        temperature: of kl.
        shift: codes [R, r] and their output weights [V, r], whose product is added to the logits.
        bias: [V], of the head's dtype, of `padded_head`.

    Returns:
        [R] for each term, float32.
    """
    logits_RV = functional.linear(hidden_RC.to(head_VC.dtype), head_VC, bias).float()
    if shift is not None:
        logits_RV = logits_RV + functional.linear(*shift).float()
    rows = LabelRows(logits_RV, labels_R, teacher, temperature)
    return tuple(term.rows(rows) for term in terms)
