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
from alpamayo_dflash.decode.sampling import choose, mask_bias
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
    shared = narrow.text[: len(narrow.text) - 1 if position is None else position]
    ways = BothWays(narrow, wide, shared, sampling=sampling, seed=seed, sample=sample)
    if position is None:
        return Parting(None, ways.largest_difference, near_tie=False)
    both = [narrow.text[position], wide.text[position]]
    return Parting(position, ways.largest_difference, near_tie=bool(ways.possible(position)[both].all()))


class BothWays:
    """One text run through the target in passes like either loop's, and what may be chosen along it.

    Args:
        narrow: the loop with fewer rows a pass.
        wide: the other one, on the same target and prompt.
        text: T tokens; the loops' own texts are not looked at.
        sampling: both loops' temperature and top_p.
        seed: both loops'.
        sample: the text's index, which its noise depends on.

    Attributes:
        narrow_TV: float32 [T + 1, V], unmasked logits; row i predicts token i, the last what follows.
        wide_TV: likewise, from passes like the wide loop's.
        largest_difference: of the logits.
    """

    def __init__(
        self, narrow: Loop, wide: Loop, text: Sequence[int], *, sampling: Sampling, seed: int, sample: int
    ) -> None:
        self.narrow_TV = _forced_logits(narrow, text)
        # A loop with proposals has rejected ones in its cache, which shift and lengthen what a row reads.
        others = [_forced_logits(wide, text, rejected) for rejected in sorted({0, wide.step - 1})]
        self.wide_TV = others[0]
        self.largest_difference = max(float((self.narrow_TV - other).abs().max()) for other in others)
        self._sampling, self._temper = sampling, 1.0 if sampling.greedy else sampling.temperature
        target, device = narrow.decoder.target, self.narrow_TV.device
        self._bias_V = mask_bias(target.traj_ids, target.vocab_size).to(device)
        self._keys = stream_keys(seed, narrow.read.prompt.key, [sample], device)

    def noise(self, position: int) -> Tensor:
        """The noise of a place, float32 [V]; zeros where greedy."""
        if self._sampling.greedy:
            return torch.zeros_like(self._bias_V)
        place = torch.tensor([position], device=self._bias_V.device)
        return row_noise(self._keys, place, len(self._bias_V))[0]

    def chosen(self, position: int) -> int:
        """What the narrow passes' logits choose at a place."""
        noise = self.noise(position)[None]
        return int(choose(self.narrow_TV[position][None], self._bias_V, self._sampling, noise))

    def possible(self, position: int) -> Tensor:
        """Which tokens logits off by the largest difference can choose at a place, bool [V]."""
        scores = self.narrow_TV[position] / self._temper + self._bias_V
        off = self.largest_difference / self._temper
        return choices_within(scores, self.noise(position), self._sampling, off)

    def perturbed(self, position: int) -> tuple[Tensor, Tensor]:
        """Tempered, masked logits with their noise, float32 [V], of the narrow and of the wide passes."""
        shift = self._bias_V + self.noise(position)
        narrow, wide = (logits[position] / self._temper + shift for logits in (self.narrow_TV, self.wide_TV))
        return narrow, wide


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
