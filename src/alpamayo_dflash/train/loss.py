"""Losses over the masks of blocks: cross-entropy, KL to stored logits, and the weights of positions.

Shapes: S blocks, B masks of a block (b−1), R label rows (the masks that have a label, block by block),
V vocabulary (rows of the draft's head), k stored logits, C hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.config import TrainConfig, decay_gamma
from alpamayo_dflash.train.data import BlockBatch

CHUNK_ELEMENTS = 1 << 26
"""Vocabulary logits computed at once: 256 MiB in float32."""


class BlockLoss(nn.Module):
    """The draft with its loss, as one module for DDP."""

    def __init__(self, draft: DFlashDraft, config: TrainConfig) -> None:
        super().__init__()
        self.draft = draft
        self.options = config
        block_size = draft.config.block_size
        gamma = decay_gamma(block_size, config.prefix_weight_gamma)
        self._decay_B = decay_weights(block_size - 1, gamma)

    def forward(self, batch: BlockBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sums over the batch's label rows.

        Labels that a reduced head has no row for get no weight in CE, and rows of which it keeps none of the
        target's stored logits none in KL; so the two have sums of weights of their own.

        Returns:
            weighted sums of CE and of KL, with gradient, and detached (sum of CE's weights, sum of KL's
            weights, CE, KL, labels without a row of the head) [5].
        """
        draft = self.draft
        labelled_SB = batch.labelled
        hidden_RC = draft(batch.states, batch.context_lengths, batch.anchors, batch.entries, labelled_SB)
        teacher = None
        if batch.teacher_logits is not None and batch.teacher_ids is not None:
            teacher = (batch.teacher_logits, batch.teacher_ids)
        labels_R = batch.labels[labelled_SB]
        has_label_R = has_teacher_R = torch.ones_like(labels_R, dtype=torch.bool)
        if draft.token_ids is not None:
            labels_R, has_label_R = head_rows(labels_R, draft.token_ids)
            if teacher is not None:
                teacher, has_teacher_R = reduced_teacher(teacher, draft.token_ids)
        ce_R, kl_R = row_losses(
            hidden_RC, draft.head, labels_R, teacher, temperature=self.options.kl_temperature
        )
        # A token that the draft cannot propose has an infinite cross-entropy, and D-PACE is to know that.
        weight_R = self._weights(ce_R.detach().masked_fill(~has_label_R, torch.inf), labelled_SB)
        ce_weight_R, kl_weight_R = weight_R * has_label_R, weight_R * has_teacher_R
        ce = (ce_weight_R * ce_R).sum()
        kl = torch.zeros_like(ce) if kl_R is None else (kl_weight_R * kl_R).sum()
        outside = (~has_label_R).sum().to(ce)
        sums = (ce_weight_R.sum(), kl_weight_R.sum(), ce.detach(), kl.detach(), outside)
        return ce, kl, torch.stack(sums)

    def _weights(self, ce_R: Tensor, labelled_SB: Tensor) -> Tensor:
        if self.options.position_weights == "decay":
            return self._decay_B.to(ce_R.device).expand(labelled_SB.shape)[labelled_SB]
        ce_SB = torch.zeros(labelled_SB.shape, device=ce_R.device)
        ce_SB[labelled_SB] = ce_R
        return dpace_weights(ce_SB, labelled_SB, self.options.dpace_alpha)[labelled_SB]


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
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy, and KL(target‖draft) where the target's logits are given, of each label row.

    The target's distribution is its top-k logits, tempered and normalised over those k; the draft's is over
    the whole vocabulary, so that mass on tokens outside the k costs too. KL is multiplied by the temperature
    squared, which keeps its gradient's size.

    Vocabulary logits exist for `chunk_elements` values at a time; where that takes more than one chunk they
    are computed again for the gradient.

    Args:
        hidden_RC: draft states after its final norm.
        head_VC: the head.
        labels_R: rows of the head: token ids where it is whole.
        teacher: the target's logits [R, k] (−inf leaves a token out) and their rows of the head [R, k].
        temperature: of KL.
        chunk_elements: see above.

    Returns:
        CE [R] and KL [R] (or None), float32.
    """
    rows = max(1, chunk_elements // head_VC.shape[0])
    if hidden_RC.shape[0] <= rows:
        return _chunk_losses(hidden_RC, head_VC, labels_R, teacher, temperature)
    parts = []
    for start in range(0, hidden_RC.shape[0], rows):
        part = slice(start, start + rows)
        few = None if teacher is None else (teacher[0][part], teacher[1][part])
        arguments = (hidden_RC[part], head_VC, labels_R[part], few, temperature)
        parts.append(checkpoint(_chunk_losses, *arguments, use_reentrant=False))
    return torch.cat([ce for ce, _ in parts]), None if teacher is None else torch.cat([kl for _, kl in parts])


def _chunk_losses(
    hidden_RC: Tensor,
    head_VC: Tensor,
    labels_R: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> tuple[Tensor, Tensor | None]:
    logits_RV = functional.linear(hidden_RC, head_VC).float()
    ce_R = functional.cross_entropy(logits_RV, labels_R, reduction="none")
    if teacher is None:
        return ce_R, None
    target_logits_Rk, ids_Rk = teacher
    target_log_Rk = (target_logits_Rk.float() / temperature).log_softmax(-1)
    target_Rk = target_log_Rk.exp()
    # Tokens that the target leaves out have probability 0 and add nothing; 0 · −inf would be nan.
    target_log_Rk = target_log_Rk.where(target_Rk > 0, torch.zeros_like(target_log_Rk))
    normaliser_R = (logits_RV / temperature).logsumexp(-1)
    draft_log_Rk = logits_RV.gather(-1, ids_Rk) / temperature - normaliser_R[:, None]
    kl_R = (target_Rk * (target_log_Rk - draft_log_Rk)).sum(-1)
    return ce_R, kl_R * temperature**2


def ce_weight(step: int, total_steps: int, start: float, end: float) -> float:
    """The share of cross-entropy in ce+kl: linear from `start` at step 0 to `end` at the last step."""
    if total_steps <= 1:
        return start
    return start + (end - start) * step / (total_steps - 1)
