"""The nucleus of a distribution (Holtzman et al. 2020), by one predicate everywhere.

A token is in if the mass of strictly more probable tokens is below top_p, so equally probable tokens are in
or out together.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def cut(probabilities_RV: Tensor, top_p: float) -> Tensor:
    """The same cut to the nucleus, summing to 1."""
    kept = probabilities_RV.masked_fill(~nucleus(probabilities_RV, top_p), 0.0)
    return kept / kept.sum(-1, keepdim=True)
