import math

import pytest
import torch
from transformers import TopPLogitsWarper

from alpamayo_dflash.common.nucleus import nucleus
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.noise import token_noise
from alpamayo_dflash.decode.sampling import choose, distribution, mask_bias


def nucleus_by_definition(row, top_p):
    return [math.fsum(q for q in row if q > p) < top_p for p in row]


def random_logits(rows, vocab, scale=3.0, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.98])
def test_nucleus_is_its_definition(top_p):
    probabilities = random_logits(40, 60).softmax(-1)
    got = nucleus(probabilities, top_p)
    for row, kept in zip(probabilities.tolist(), got.tolist(), strict=True):
        assert kept == nucleus_by_definition(row, top_p)


def test_the_whole_mass_is_every_token():
    assert nucleus(random_logits(10, 60, scale=30.0).softmax(-1), 1.0).all()


def test_nucleus_keeps_ties_together():
    probabilities = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.2, 0.2, 0.1], [0.1, 0.2, 0.5, 0.2]])
    assert nucleus(probabilities, 0.1).tolist() == [
        [True] * 4,
        [True, False, False, False],
        [False, False, True, False],
    ]
    assert nucleus(probabilities, 0.6).tolist() == [
        [True] * 4,
        [True, True, True, False],
        [False, True, True, True],
    ]
    # the mass above the pair is 0.5 exactly: not below 0.5
    assert nucleus(probabilities, 0.5)[1].tolist() == [True, False, False, False]


@pytest.mark.parametrize("top_p", [0.1, 0.7, 0.98])
def test_nucleus_is_transformers_on_untied_rows(top_p):
    logits = random_logits(50, 300)
    warped = TopPLogitsWarper(top_p)(torch.zeros(50, 1, dtype=torch.long), logits)
    assert torch.equal(nucleus(logits.softmax(-1), top_p), torch.isfinite(warped))


def test_mask_bias_hides_target_ids_of_any_head():
    assert mask_bias(range(2, 4), 6).tolist() == [0, 0, -math.inf, -math.inf, 0, 0]
    ids = torch.tensor([5, 3, 0, 2])
    assert mask_bias(range(2, 4), 4, ids).tolist() == [0, -math.inf, 0, -math.inf]


def plain_choice(row, masked, sampling, noise):
    """The design's words, in Python floats: arg max of log p + g over the nucleus, lowest id on ties."""
    allowed = [i for i in range(len(row)) if i not in masked]
    if sampling.greedy:
        return max(allowed, key=lambda i: (row[i], -i))
    weights = {i: math.exp((row[i] - max(row[j] for j in allowed)) / sampling.temperature) for i in allowed}
    total = math.fsum(weights.values())
    p = {i: w / total for i, w in weights.items()}
    inside = [i for i in allowed if math.fsum(q for q in p.values() if q > p[i]) < sampling.top_p]
    return max(inside, key=lambda i: (row[i] / sampling.temperature + noise[i], -i))


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(0.6, 0.98), Sampling(1.0, 0.3), Sampling(2.0, 1.0)]
)
def test_choose_is_the_plain_choice(sampling):
    logits = random_logits(120, 40, scale=2.0, seed=1)
    noise = token_noise(0, "w", [0], range(120), 40)[:, 0]
    masked = range(30, 36)
    got = choose(logits, mask_bias(masked, 40), sampling, noise).tolist()
    expected = [
        plain_choice(row, masked, sampling, g) for row, g in zip(logits.tolist(), noise.tolist(), strict=True)
    ]
    assert got == expected
    assert not set(got) & set(masked)


def test_choose_is_the_plain_choice_where_the_nucleus_is_small():
    # Flat rows and a small top_p send nearly every first pick outside, through the other branch.
    sampling = Sampling(1.0, 0.05)
    logits = random_logits(200, 100, scale=0.5, seed=2)
    noise = token_noise(1, "w", [0], range(200), 100)[:, 0]
    expected = [
        plain_choice(row, (), sampling, g) for row, g in zip(logits.tolist(), noise.tolist(), strict=True)
    ]
    assert choose(logits, mask_bias(range(0), 100), sampling, noise).tolist() == expected


def test_ties_go_to_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    bias = mask_bias(range(1, 2), 5)
    assert choose(logits, bias, Sampling(0.0)).tolist() == [2]
    flat = torch.zeros(1, 5)
    assert choose(flat, bias, Sampling(1.0, 0.9), torch.tensor([[0.0, 9.0, 1.0, 1.0, 0.5]])).tolist() == [2]


def test_choices_do_not_depend_on_the_other_rows():
    sampling = Sampling(0.8, 0.95)
    logits = random_logits(64, 500, seed=3)
    noise = token_noise(2, "w", [0], range(64), 500)[:, 0]
    bias = mask_bias(range(0), 500)
    together = choose(logits, bias, sampling, noise)
    alone = torch.cat([choose(logits[i : i + 1], bias, sampling, noise[i : i + 1]) for i in range(64)])
    assert torch.equal(together, alone)


def test_distribution_is_what_choose_draws_from():
    sampling = Sampling(0.7, 0.9)
    logits = random_logits(1, 12, scale=1.5, seed=4)
    bias = mask_bias(range(3, 5), 12)
    probabilities = distribution(logits, bias, sampling)[0].double()
    assert float(probabilities.sum()) == pytest.approx(1)
    assert not probabilities[3:5].any()
    draws = 20_000
    noise = token_noise(0, "w", [0], range(draws), 12)[:, 0]
    counts = torch.bincount(choose(logits.expand(draws, -1), bias, sampling, noise), minlength=12).double()
    assert not counts[probabilities == 0].any()
    expected = probabilities * draws
    seen = expected > 5
    statistic = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
    degrees = int(seen.sum()) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_greedy_distribution_is_one_hot():
    logits = random_logits(3, 8)
    got = distribution(logits, mask_bias(range(0), 8), Sampling(0.0))
    assert torch.equal(got.argmax(-1), logits.argmax(-1))
    assert torch.equal(got.sum(-1), torch.ones(3))
