"""Does decoding draw from the target's distribution? The exact joint distribution, and a test against it.

The noise of a place is fixed by its seed, so what one seed gives proves little: over many seeds, the
frequencies of the first tokens *jointly* must be the target's.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.rollout import SpeculativeDecoder
from alpamayo_dflash.decode.sampling import distribution, mask_bias
from alpamayo_dflash.decode.tail import ROOT
from alpamayo_dflash.decode.verify import Prefilled, Verifier
from alpamayo_dflash.decode.walk import Tree

Text = tuple[int, ...]

_TEXTS_A_PASS = 256
_ROUNDING = 1e-5
_LEAST_EXPECTED = 5.0  # cells that expect fewer are pooled, as is usual for this test


@dataclass(frozen=True)
class ChiSquare:
    """A goodness-of-fit test.

    Attributes:
        statistic: chi-square.
        degrees: of freedom.
        p_value: the chance of a statistic at least as large if the frequencies are right; 0 if something was
            observed that cannot occur.
        draws: how many observations.
    """

    statistic: float
    degrees: int
    p_value: float
    draws: int


def joint_distribution(
    decoder: SpeculativeDecoder,
    prefilled: Prefilled,
    depth: int,
    sampling: Sampling,
    least: float = 0.0,
) -> dict[Text, float]:
    """The target's own distribution of the first tokens: tempered, nucleus-cut, trajectory ids masked.

    Every text is extended by each token of its nucleus, level by level; no noise takes part.

    Args:
        decoder: has read the prompt; what it has in its cache behind the prompt is lost.
        prefilled: the prompt.
        depth: how many tokens.
        sampling: temperature and top_p.
        least: texts less probable than this are left out, so that the values sum to less than 1.

    Returns:
        Probability by text; texts that end before `depth` have shorter keys.
    """
    target = decoder.target
    bias = mask_bias(target.traj_ids, target.vocab_size).to(target.device)
    ended: dict[Text, float] = {}
    open_texts: dict[Text, float] = {(): 1.0}
    for _ in range(depth):
        logits = _next_logits(decoder.verifier, prefilled, list(open_texts))
        rows = distribution(logits, bias, sampling).double()
        longer = {
            (*text, token): probability * float(row[token])
            for (text, probability), row in zip(open_texts.items(), rows, strict=True)
            for token in row.nonzero().flatten().tolist()
        }
        longer = {text: probability for text, probability in longer.items() if probability >= least}
        stopped = {text for text in longer if decoder.rules.reason(text[-1]) is not None}
        ended |= {text: longer[text] for text in stopped}
        open_texts = {text: probability for text, probability in longer.items() if text not in stopped}
    return ended | open_texts


@torch.inference_mode()
def _next_logits(verifier: Verifier, prefilled: Prefilled, texts: Sequence[Text]) -> Tensor:
    """Logits [R, V] of what follows each text behind the prompt; texts share the rows of equal beginnings."""
    if texts == [()]:
        return prefilled.logits_V.unsqueeze(0)
    parts = []
    for first in range(0, len(texts), _TEXTS_A_PASS):
        batch = texts[first : first + _TEXTS_A_PASS]
        verifier.begin(prefilled, sum(len(text) for text in batch))
        tree = Tree(verifier.cache.tail)
        leaves = [tree.add_chain(text, ROOT)[-1] for text in batch]
        row = {slot: index for index, slot in enumerate(tree.slots)}
        parts.append(verifier.rows(tree.slots)[[row[leaf] for leaf in leaves]])
    return torch.cat(parts) if parts else prefilled.logits_V.new_zeros(0, len(prefilled.logits_V))


def count_texts(
    decoder: SpeculativeDecoder,
    prefilled: Prefilled,
    depth: int,
    sampling: Sampling,
    seeds: Iterable[int],
    *,
    num_traj_samples: int = 1,
    max_new_tokens: int | None = None,
) -> Counter[Text]:
    """Decode behind one prompt with many seeds and count the first `depth` tokens of every sample.

    Args:
        decoder: with or without a draft; has read the prompt.
        prefilled: the prompt.
        depth: how many tokens count.
        sampling: temperature and top_p.
        seeds: each is one decode.
        num_traj_samples: samples a decode; all of them count.
        max_new_tokens: how far each text is written; None writes no more than count. A few more let a
            draft's proposals run past the counted tokens, as they do in use.
    """
    counts: Counter[Text] = Counter()
    for seed in seeds:
        result = decoder.generate(
            prefilled,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            num_traj_samples=num_traj_samples,
            seed=seed,
            max_new_tokens=max_new_tokens or depth,
            trajectories=False,
        )
        counts.update(tuple(tokens[:depth]) for tokens in result.token_ids)
    return counts


def chi_square(counts: Mapping[Text, int], joint: Mapping[Text, float]) -> ChiSquare:
    """Test counts against a distribution.

    Texts that expect fewer than five observations are pooled into one cell, with whatever the distribution
    leaves out.

    Args:
        counts: observations by text.
        joint: probability by text; may sum to less than 1.

    Raises:
        ValueError: there are too few observations for two cells.
    """
    draws = sum(counts.values())
    own = {text: probability * draws for text, probability in joint.items()}
    own = {text: expected for text, expected in own.items() if expected >= _LEAST_EXPECTED}
    pairs = [(counts.get(text, 0), expected) for text, expected in own.items()]
    rest = draws - sum(expected for _, expected in pairs)
    rest_seen = draws - sum(seen for seen, _ in pairs)
    if rest >= _LEAST_EXPECTED:
        pairs.append((rest_seen, rest))
    elif pairs:
        seen, expected = pairs.pop()  # too small to stand alone: it joins the last cell
        pairs.append((seen + rest_seen, expected + rest))
    if len(pairs) < 2:
        raise ValueError(f"{draws} observations make {len(pairs)} cell(s) of five or more; draw more")
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in pairs)
    degrees = len(pairs) - 1
    if _is_complete(joint) and not counts.keys() <= joint.keys():
        return ChiSquare(statistic, degrees, 0.0, draws)
    upper = torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double())
    return ChiSquare(statistic, degrees, float(upper), draws)


def _is_complete(joint: Mapping[Text, float]) -> bool:
    """Whether the distribution leaves nothing out; its float32 probabilities sum to 1 within rounding."""
    return sum(joint.values()) > 1 - _ROUNDING
