"""Proposals with a given distribution of acceptance lengths, where weights are random and accept nothing.

The draft runs its real forward, and then the target's own continuation is proposed, right up to a drawn number
of tokens and wrong behind it. What is measured so is labelled "replayed".

Shapes: S sample, T tokens, b block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alpamayo_dflash.decode.steps import State


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
    """Proposes known texts, each proposed token in turn right at a rate.

    Args:
        samples: the most samples.
        length: the longest text.
        block: b.
        rate: see `rate_for`.
        vocab: V, from which the wrong tokens are.
        device: where the rounds run.
    """

    def __init__(
        self, *, samples: int, length: int, block: int, rate: float, vocab: int, device: torch.device
    ) -> None:
        self._shape, self._block, self._rate, self._vocab = (samples, length), block, rate, vocab
        self._texts = torch.zeros(samples, length + block, dtype=torch.int64, device=device)
        self._right = torch.zeros(samples, length + block, dtype=torch.int64, device=device)
        self._steps = torch.arange(block - 1, device=device)

    def load(self, texts: Sequence[Sequence[int]], seed: int) -> None:
        """Take the texts to propose, and draw how many tokens are right behind each position."""
        random = np.random.default_rng(seed)
        wrong = random.random((*self._right.shape, self._block - 1)) >= self._rate
        count = np.where(wrong.any(-1), wrong.argmax(-1), self._block - 1)
        self._right.copy_(torch.from_numpy(count))
        rows = torch.zeros(self._texts.shape, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=False):
            row[: len(text)] = torch.tensor(text)
        self._texts.copy_(rows)

    def __call__(self, state: State) -> Tensor:
        """Target ids [S·(b − 1)] to propose; nothing is read back."""
        samples = state.samples
        anchor = state.lengths[:, None] - 1
        places = (anchor + 1 + self._steps).clamp_max(self._texts.shape[1] - 1)
        tokens = self._texts[:samples].gather(1, places)
        right = self._steps < self._right[:samples].gather(1, anchor.clamp_max(self._right.shape[1] - 1))
        return torch.where(right, tokens, (tokens + 1) % self._vocab).flatten()
