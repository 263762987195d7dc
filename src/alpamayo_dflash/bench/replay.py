"""Proposals with a given distribution of acceptance lengths, where weights are random and accept nothing.

The draft runs its real forward, and then the target's own continuation is proposed, right up to a drawn
number of tokens and wrong after it. What is measured so is labelled "replayed".

Shapes: S sample, T tokens, b block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.decode.steps import Chains, State


def passes(tokens: int, rate: float, block: int) -> float:
    """Expected verify passes for so many tokens, if each proposed token in turn is right at this rate."""
    right = [rate**count * (1 - rate) for count in range(block - 1)] + [rate ** (block - 1)]
    expected = [0.0]
    for left in range(1, tokens + 1):
        behind = sum(share * expected[max(0, left - count - 1)] for count, share in enumerate(right))
        expected.append(1 + behind)
    return expected[tokens]


def rate_for(acceptance: float, tokens: int, block: int) -> float:
    """The rate at which texts of so many tokens after the first have this acceptance length.

    Raises:
        ValueError: no rate gives it.
    """
    most = tokens / passes(tokens, 1.0, block)
    if not 1 <= acceptance <= most:
        raise ValueError(
            f"acceptance is {acceptance}; with {tokens} tokens and block {block} it is 1 to {most:.3f}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens / passes(tokens, middle, block) < acceptance else (low, middle)
    return (low + high) / 2


class Replay:
    """A `Captured` proposer of known texts, each proposed token in turn right at a rate.

    Args:
        samples: the most samples.
        length: the longest text.
        block: b.
        rate: see `rate_for`.
        vocab: V, from which the wrong tokens are.
        device: where the rounds run.
    """

    source = "replay"

    def __init__(
        self, *, samples: int, length: int, block: int, rate: float, vocab: int, device: torch.device
    ) -> None:
        self._block, self._rate, self._vocab = block, rate, vocab
        self._whole = torch.full((samples,), block - 1, device=device)
        self._proposals = torch.zeros(samples, length + block, block - 1, dtype=torch.int64, device=device)

    def load(self, texts: Sequence[Sequence[int]], seed: int) -> None:
        """Take the texts to propose, and draw how many tokens are right behind each position.

        Args:
            texts: token ids, a text a sample.
            seed: of the draws.

        Raises:
            ValueError: a text is longer than there is room for.
        """
        random = np.random.default_rng(generator_seed(seed))
        samples, length, count = self._proposals.shape
        longest = max(map(len, texts))
        if longest > length:
            raise ValueError(f"a text to replay has {longest} tokens; there is room for {length}")
        wrong = random.random((samples, length, count)) >= self._rate
        right = np.where(wrong.any(-1), wrong.argmax(-1), count)
        tokens = np.zeros((samples, length + self._block), dtype=np.int64)
        for row, text in zip(tokens, texts, strict=False):
            row[: len(text)] = text
        following = np.stack([tokens[:, 1 + step : 1 + step + length] for step in range(count)], axis=-1)
        said = np.where(np.arange(count) < right[..., None], following, (following + 1) % self._vocab)
        self._proposals.copy_(torch.from_numpy(said))

    def __call__(self, state: State) -> Chains:
        """See Captured."""
        samples, count = state.samples, self._block - 1
        places = (state.lengths - 1)[:, None, None].expand(-1, -1, count)
        return self._proposals[:samples].gather(1, places)[:, 0], self._whole[:samples]
