"""From logits to tokens: mask, temper, cut the nucleus, add noise, take the arg max.

One nucleus predicate holds everywhere: a token is in if the mass of strictly more probable tokens is below
top_p, so equally probable tokens are in or out together. The same functions serve target and draft.

Shapes: R rows, V vocabulary (of the target, or of a draft's reduced head).
"""

from __future__ import annotations

import torch
from torch import Tensor

from alpamayo_dflash.decode.config import Sampling


def mask_bias(masked: range, vocab_size: int, token_ids: Tensor | None = None) -> Tensor:
    """What to add to logits so that masked target ids are never chosen.

    Args:
        masked: target ids that generation masks (the trajectory tokens).
        vocab_size: V, columns of the logits.
        token_ids: int64 [V], the target id of each column; None where column and id are the same.

    Returns:
        float32 [V], 0 or minus infinity.
    """
    ids = torch.arange(vocab_size) if token_ids is None else token_ids
    hidden = (ids >= masked.start) & (ids < masked.stop)
    return torch.zeros(vocab_size, device=ids.device).masked_fill_(hidden, float("-inf"))


def nucleus(probabilities_RV: Tensor, top_p: float) -> Tensor:
    """Return bool [R, V]: the tokens for which the mass of strictly more probable tokens is below top_p."""
    if top_p >= 1:
        return torch.ones_like(probabilities_RV, dtype=torch.bool)
    ranked = probabilities_RV.sort(dim=-1, descending=True).values
    before = torch.nn.functional.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
    # A tie's first member decides for all of it, and it is the last to pass if any passes: so the nucleus
    # is everything at least as probable as the last rank that passes.
    last = (before < top_p).sum(-1, keepdim=True).clamp_min(1) - 1
    return probabilities_RV >= ranked.gather(-1, last)


def distribution(logits_RV: Tensor, bias_V: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that `choose` draws from.

    Args:
        logits_RV: float32 [R, V].
        bias_V: from `mask_bias`.
        sampling: temperature and top_p.

    Returns:
        float32 [R, V]: tempered, cut to the nucleus and summing to 1; one-hot where sampling is greedy.
    """
    if sampling.greedy:
        best = (logits_RV + bias_V).argmax(-1)
        return torch.nn.functional.one_hot(best, logits_RV.shape[-1]).to(logits_RV.dtype)
    probabilities = torch.add(bias_V, logits_RV, alpha=1 / sampling.temperature).softmax(-1)
    kept = probabilities.masked_fill(~nucleus(probabilities, sampling.top_p), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def choose(logits_RV: Tensor, bias_V: Tensor, sampling: Sampling, noise_RV: Tensor | None = None) -> Tensor:
    """Choose one token a row.

    Greedy: the arg max, the lowest id on ties. Otherwise the arg max of `log p + g` over the nucleus of the
    tempered distribution p, which with Gumbel noise g is a draw from it (design, invariant 2).

    The arg max over all tokens is taken first. Where the mass above it shows that it lies in the nucleus, it
    is the answer, and nothing need be sorted; the few other rows are done again over their nucleus.

    Args:
        logits_RV: float32 [R, V].
        bias_V: from `mask_bias`.
        sampling: temperature and top_p.
        noise_RV: float32 [R, V] Gumbel noise; not read if greedy.

    Returns:
        int64 [R] column indices.
    """
    if sampling.greedy:
        return (logits_RV + bias_V).argmax(-1)
    assert noise_RV is not None, "sampling needs noise"
    scores = torch.add(bias_V, logits_RV, alpha=1 / sampling.temperature)
    perturbed = scores + noise_RV
    picks = perturbed.argmax(-1)
    if sampling.top_p >= 1:
        return picks
    probabilities = scores.softmax(-1)
    above = (probabilities * (probabilities > probabilities.gather(-1, picks.unsqueeze(-1)))).sum(-1)
    outside = (above >= sampling.top_p).nonzero().flatten()
    if len(outside):
        inside = nucleus(probabilities[outside], sampling.top_p)
        picks[outside] = perturbed[outside].masked_fill(~inside, float("-inf")).argmax(-1)
    return picks
