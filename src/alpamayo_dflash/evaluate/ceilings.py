"""What a block draft could accept at most: proposers that know the target, in the real loop.

`TextOracle` knows what the target is about to write. `IndependentOracle` knows, at each place of a block, the
exact distribution of the target's token there, given the text up to the anchor and nothing of what the block
holds before that place; a draft that fills its places independently can be no better.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alpamayo_dflash.decode.config import DecodeConfig, Sampling
from alpamayo_dflash.decode.loop import Sample
from alpamayo_dflash.decode.noise import TokenNoise
from alpamayo_dflash.decode.proposer import Listed, Proposed
from alpamayo_dflash.decode.sampling import distribution, mask_bias
from alpamayo_dflash.decode.stops import StopRules
from alpamayo_dflash.decode.verify import Prefilled, Verifier
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.prompt import Prompt

LEAST_MASS = 1e-3
"""Continuations of less probability than this, given the text up to the anchor, are left out of marginals."""

Text = tuple[int, ...]


class TextOracle(Listed):
    """Proposes the text that the target is about to write: the ceiling of any draft of this block size.

    Args:
        block_size: b; b − 1 tokens are proposed.

    Attributes:
        text: of the one sample that is decoded next.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.text: Sequence[int] = ()

    def propose(self, samples: Sequence[Sample]) -> list[Proposed]:
        """See Listed."""
        ends = [len(sample.tokens) for sample in samples]
        return [Proposed(self.text[end : end + self.block_size - 1], source="oracle") for end in ends]


class Continuations:
    """The target's next-token distributions after texts to one prompt, each computed once.

    Args:
        target: the model.
        sampling: temperature and nucleus, which make the distribution that tokens are drawn from.
        rules: where texts end.
    """

    def __init__(self, target: Alpamayo, sampling: Sampling, rules: StopRules) -> None:
        self._sampling, self._rules = sampling, rules
        self._verifier = Verifier(target, prompt_capacity=DecodeConfig().prompt_capacity)
        self._bias = mask_bias(target.traj_ids, target.vocab_size).to(target.device)
        self._read: Prefilled | None = None
        self._known: dict[Text, dict[int, float]] = {}

    def read(self, prompt: Prompt) -> None:
        """Take a prompt; what is asked next is of its texts."""
        if self._read is None or self._read.prompt.key != prompt.key:
            self._read, self._known = self._verifier.prefill(prompt), {}

    def marginals(self, text: Text, places: int) -> list[dict[int, float]]:
        """Where a text goes on: the mass of each token at each of the next places.

        Args:
            text: emitted tokens, which do not end.
            places: how many places; those after a text's end are left out of the mass.
        """
        masses: list[dict[int, float]] = []
        reached: dict[Text, float] = {text: 1.0}
        for _ in range(places):
            after = self._next([each for each in reached if self._rules.reason(each[-1]) is None])
            place: dict[int, float] = defaultdict(float)
            following: dict[Text, float] = {}
            for before, found in after.items():
                for token, share in found.items():
                    mass = reached[before] * share
                    if mass >= LEAST_MASS:
                        place[token] += mass
                        following[(*before, token)] = mass
            masses.append(place)
            reached = following
        return masses

    def _next(self, texts: Sequence[Text]) -> Mapping[Text, dict[int, float]]:
        """The distribution after each text; those not known yet take one pass together."""
        new = [text for text in texts if text not in self._known]
        if new:
            assert self._read is not None
            forced = self._verifier.force(self._read, new)
            last = torch.stack([forced.logits(index)[-1] for index in range(len(new))])
            for text, row in zip(new, distribution(last, self._bias, self._sampling), strict=True):
                tokens = row.nonzero().flatten()
                self._known[text] = dict(zip(tokens.tolist(), row[tokens].tolist(), strict=True))
        return {text: self._known[text] for text in texts}


class IndependentOracle(Listed):
    """Fills a block's places independently, each from the target's exact marginal there.

    The picks have the noise of their places, as a draft's have.

    Args:
        target: the model.
        block_size: b.
        sampling: of the decode.
        rules: where texts end.

    Attributes:
        seed: of the decode that comes next; one sample.
    """

    def __init__(self, target: Alpamayo, block_size: int, sampling: Sampling, rules: StopRules) -> None:
        self._continuations = Continuations(target, sampling, rules)
        self.block_size, self._vocab = block_size, target.vocab_size
        self._device = target.device
        self.seed = 0

    def begin(self, prefilled: Prefilled, samples: Sequence[Sample]) -> None:
        """See Listed."""
        prompt = prefilled.prompt
        self._continuations.read(prompt)
        self._noise = TokenNoise(self.seed, prompt.key, range(len(samples)), self._vocab, self._device)

    def propose(self, samples: Sequence[Sample]) -> list[Proposed]:
        """See Listed."""
        return [Proposed(self._picks(sample), source="oracle") for sample in samples]

    def _picks(self, sample: Sample) -> list[int]:
        picks = []
        for place, masses in enumerate(
            self._continuations.marginals(tuple(sample.tokens), self.block_size - 1)
        ):
            if not masses:
                break
            noise_V = self._noise.rows([sample.index], [len(sample.tokens) + place])[0]
            picks.append(_pick(masses, noise_V))
        return picks


def _pick(masses: Mapping[int, float], noise_V: Tensor) -> int:
    """The token that is drawn from masses with Gumbel noise; the lowest id of equals."""
    tokens = sorted(masses)
    mass = torch.tensor([masses[token] for token in tokens], device=noise_V.device)
    return tokens[int((mass.log() + noise_V[tokens]).argmax())]
