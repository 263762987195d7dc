"""The terms of a draft's loss, in one list; `loss.py` computes them, everything else reads the list.

The command line checks names by it, so importing this file does not import torch. Formulas, sources and what
each term is for: `docs/training.md`.

Shapes: R label rows, V vocabulary (rows of the draft's head), k stored logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LabelRows:
    """What the terms are computed from.

    Attributes:
        logits_RV: the draft's logits, float32.
        labels_R: rows of the head: token ids where it is whole.
        teacher: the target's logits [R, k] (−inf leaves a token out) and their rows of the head [R, k]; None
            where no term needs them. A token that is left out may stand in several of the k places.
        kl_temperature: divides both sides' logits in kl.
    """

    logits_RV: Tensor
    labels_R: Tensor
    teacher: tuple[Tensor, Tensor] | None
    kl_temperature: float = 1.0
    _found: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def log_probabilities(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Tempered log-probabilities of the stored tokens: the target's and the draft's, [R, k] both.

        The target's are normalised over those k, −inf for tokens that are left out; the draft's over the
        whole vocabulary.
        """
        if temperature not in self._found:
            assert self.teacher is not None
            logits_Rk, ids_Rk = self.teacher
            normaliser_R = (self.logits_RV / temperature).logsumexp(-1)
            self._found[temperature] = (
                (logits_Rk.float() / temperature).log_softmax(-1),
                self.logits_RV.gather(-1, ids_Rk) / temperature - normaliser_R[:, None],
            )
        return self._found[temperature]


@dataclass(frozen=True)
class Term:
    """A loss of single label rows.

    Attributes:
        name: as `loss_type`, logs and `train.json` call it.
        needs_teacher: whether it is computed from the target's stored logits, not from the label.
        rows: gives the loss of each row, [R] float32.
    """

    name: str
    needs_teacher: bool
    rows: Callable[[LabelRows], Tensor]


def _cross_entropy(rows: LabelRows) -> Tensor:
    """−log q(label)."""
    return -rows.logits_RV.log_softmax(-1).gather(-1, rows.labels_R[:, None])[:, 0]


def _kl(rows: LabelRows) -> Tensor:
    """KL(target‖draft), both tempered, times the temperature squared (Hinton et al. 2015).

    The factor keeps the gradient's size. The draft's mass on tokens outside the k costs through its
    normaliser.
    """
    target_log_Rk, draft_log_Rk = rows.log_probabilities(rows.kl_temperature)
    target_Rk = target_log_Rk.exp()
    # Tokens that the target leaves out have probability 0 and add nothing; 0 · −inf would be nan.
    target_log_Rk = target_log_Rk.masked_fill(target_Rk == 0, 0.0)
    return (target_Rk * (target_log_Rk - draft_log_Rk)).sum(-1) * rows.kl_temperature**2


def _total_variation(rows: LabelRows) -> Tensor:
    """½ Σ|p − q| over all tokens: the rejection probability of speculative sampling.

    Both sum to one, so it is 1 − Σ min(p, q); outside the k, p is 0 and so is the minimum, which counts the
    draft's mass there whole. A drafted token is accepted with probability min(1, p/q), so by Σ min(p, q) in
    all (Leviathan et al. 2023; Chen et al. 2023). Its gradient is at most q, so it hardly moves a draft that
    is far off; see `lk`.
    """
    target_log_Rk, draft_log_Rk = rows.log_probabilities()
    return 1 - target_log_Rk.exp().minimum(draft_log_Rk.exp()).sum(-1)


def _log_acceptance(rows: LabelRows) -> Tensor:
    """−log Σ min(p, q): the negative log of the acceptance probability (Samarin et al. 2026, LK losses).

    1 − Σ min(p, q) is the rejection probability (see `tv`), so this is never below it, 0 where p = q, and
    its gradient is that of `tv` divided by the acceptance: as strong where next to nothing is accepted. A
    prefix is accepted with the product of its places' acceptances a_i, and each of the B prefixes of a block
    contains no more factors than the whole: the expected accepted prefix Σ_m Π_{i≤m} a_i is at least
    B·Π a_i, so its log is at least log B − Σ_i lk_i. The sum of this loss over a block bounds what a draft
    is for. With a target that is sure of one token it is that token's cross-entropy.

    In logs: log Σ exp(min(log p, log q)); a token that the target leaves out adds exp(−inf), and no gradient.
    """
    target_log_Rk, draft_log_Rk = rows.log_probabilities()
    return -target_log_Rk.minimum(draft_log_Rk).logsumexp(-1)


CROSS_ENTROPY = Term("ce", needs_teacher=False, rows=_cross_entropy)

LOSSES = {
    term.name: term
    for term in (
        CROSS_ENTROPY,
        Term("kl", needs_teacher=True, rows=_kl),
        Term("tv", needs_teacher=True, rows=_total_variation),
        Term("lk", needs_teacher=True, rows=_log_acceptance),
    )
}
"""All terms by name. A mix is computed, summed and logged in this order, however it is spelled."""


def parse_mix(loss_type: str) -> tuple[Term, ...]:
    """The terms of a mix such as ce+kl, in the order of `LOSSES`.

    Raises:
        ValueError: a name is unknown or stands twice.
    """
    names = loss_type.split("+")
    if not set(names) <= LOSSES.keys() or len(set(names)) < len(names):
        known = ", ".join(LOSSES)
        raise ValueError(
            f"loss_type is {loss_type!r}; it must be one of {known}, or several of them, each once, with + "
            "between, such as ce+kl"
        )
    return tuple(term for name, term in LOSSES.items() if name in names)


def shares(terms: Sequence[Term], ce_share: float) -> dict[str, float]:
    """The weight of each term, by name: cross-entropy `ce_share`, the others equal parts of the rest.

    A mix of cross-entropy alone has weight 1, one without it equal parts of 1.
    """
    others = [term.name for term in terms if term is not CROSS_ENTROPY]
    if not others:
        return {CROSS_ENTROPY.name: 1.0}
    first = {CROSS_ENTROPY.name: ce_share} if len(others) < len(terms) else {}
    return first | {name: (1 - sum(first.values())) / len(others) for name in others}


def ce_weight(step: int, total_steps: int, start: float, end: float) -> float:
    """The share of cross-entropy in a mix: linear from `start` at step 0 to `end` at the last step."""
    if total_steps <= 1:
        return start
    return start + (end - start) * step / (total_steps - 1)
