"""Where two texts of one prompt part, and whether that is a near-tie (design, invariant 1).

In bfloat16 a product over another number of rows rounds differently, so two loops may part where two tokens
are as good as equal, or where one stands at the nucleus' edge. How far logits differ between the two is
measured, on the text that both share. Both tokens must be choices that logits off by that much can make;
then it is a near-tie. Anything else is an error.

Shapes: R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.noise import row_noise, stream_keys
from alpamayo_dflash.decode.sampling import mask_bias
from alpamayo_dflash.decode.verify import Prefilled


@dataclass(frozen=True)
class Loop:
    """One of the two loops that wrote.

    Attributes:
        decoder: the loop's.
        read: the prompt, as this decoder has read it last.
        text: what it wrote.
        step: rows of one of its passes that are this text's: 1, or a block.
        rows: rows of one of its passes, R.
    """

    decoder: SpeculativeDecoder
    read: Prefilled
    text: Sequence[int]
    step: int
    rows: int


@dataclass(frozen=True)
class Parting:
    """How two texts compare.

    Attributes:
        position: of the first token that differs; None if one is the other's beginning or they are equal.
        largest_difference: of the logits on the text that they share.
        near_tie: whether there is such a position, and both tokens are choices within that difference.
    """

    position: int | None
    largest_difference: float
    near_tie: bool


@torch.inference_mode()
def parting(narrow: Loop, wide: Loop, *, sampling: Sampling, seed: int, sample: int = 0) -> Parting:
    """Compare two loops' texts of one prompt.

    Args:
        narrow: the loop with fewer rows a pass.
        wide: the other one, on the same target and prompt.
        sampling: both loops' temperature and top_p.
        seed: both loops'.
        sample: the text's index, which its noise depends on.
    """
    pairs = enumerate(zip(narrow.text, wide.text, strict=False))
    position = next((index for index, (a, b) in pairs if a != b), None)
    shared = list(narrow.text[: len(narrow.text) - 1 if position is None else position])
    logits = _forced_logits(narrow, shared)
    # A loop with proposals has rejected ones in its cache, which shift and lengthen what a row reads.
    others = [_forced_logits(wide, shared, rejected) for rejected in sorted({0, wide.step - 1})]
    largest = max(float((logits - other).abs().max()) for other in others)
    if position is None:
        return Parting(None, largest, near_tie=False)
    target, device = narrow.decoder.target, logits.device
    temper = 1.0 if sampling.greedy else sampling.temperature
    scores = logits[position] / temper + mask_bias(target.traj_ids, target.vocab_size).to(device)
    noise = torch.zeros_like(scores)
    if not sampling.greedy:
        keys = stream_keys(seed, narrow.read.prompt.key, [sample], device)
        noise = row_noise(keys, torch.tensor([position], device=device), target.vocab_size)[0]
    possible = choices_within(scores, noise, sampling, largest / temper)
    both = torch.tensor([narrow.text[position], wide.text[position]], device=device)
    return Parting(position, largest, near_tie=bool(possible[both].all()))


def choices_within(scores_V: Tensor, noise_V: Tensor, sampling: Sampling, off: float) -> Tensor:
    """The tokens that may be chosen if every score is off by at most so much, bool [V].

    Args:
        scores_V: tempered, masked logits.
        noise_V: Gumbel noise; zeros where greedy.
        sampling: temperature and top_p.
        off: the most that a score is off, in its own units.
    """
    perturbed = scores_V + noise_V
    possible = scores_V > float("-inf")
    if sampling.greedy or sampling.top_p >= 1:
        best = perturbed.max()
        return possible & (perturbed >= best - 2 * off)
    probabilities = scores_V.softmax(-1)
    ordered, order = scores_V.sort(descending=True)
    mass = torch.cat((scores_V.new_zeros(1), probabilities[order].cumsum(-1)))
    # Of two scores the difference is off by twice as much; so are the odds of what lies above a token.
    least, most = (
        torch.searchsorted(-ordered, -(scores_V + shift), right=right)
        for shift, right in ((2 * off, False), (-2 * off, True))
    )
    above_least, above_most = mass[least], (mass[most] - probabilities).clamp_min(0)
    possible = possible & (_with_odds(above_least, -2 * off) < sampling.top_p)
    sure = _with_odds(above_most, 2 * off) < sampling.top_p
    best = perturbed.masked_fill(~sure, float("-inf")).max()
    # All tokens outside the nucleus have a mass of at most 1 − p, so among more than that one is inside.
    descending, by_noise = perturbed.sort(descending=True)
    outside = _with_odds(scores_V.new_tensor(1 - sampling.top_p), 2 * off)
    enough = probabilities[by_noise].cumsum(-1) > outside
    best = torch.maximum(best, descending[enough.long().argmax()])
    return possible & (perturbed >= best - 2 * off)


def _with_odds(probability: Tensor, shift: float) -> Tensor:
    """A probability whose log odds are shifted."""
    raised = probability * math.exp(shift)
    return raised / (raised + (1 - probability).clamp_min(0))


def _forced_logits(loop: Loop, text: Sequence[int], rejected: int = 0) -> Tensor:
    """Logits [T + 1, V] of a text's tokens and the one after it, in passes like the loop's.

    Args:
        loop: the loop.
        text: T tokens.
        rejected: so many rows of rejected proposals lie in the tail before the text's.
    """
    verifier = loop.decoder.verifier
    return verifier.force(loop.read, [text], step=loop.step, width=loop.rows, rejected=rejected).logits(0)
