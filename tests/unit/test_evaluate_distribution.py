"""The statistical tests themselves: they pass what is right and fail what is not."""

from __future__ import annotations

import random

import pytest
import torch

from alpamayo_dflash.evaluate import distribution
from alpamayo_dflash.evaluate.distribution import contingency, entropy, frequency_test, upper_tail

JOINT = {(1,): 0.5, (2, 3): 0.3, (2, 4): 0.2}


def draws(joint: dict[tuple[int, ...], float], count: int, seed: int = 0) -> list[list[tuple[int, ...]]]:
    generator = random.Random(seed)
    return [[each] for each in generator.choices(list(joint), weights=list(joint.values()), k=count)]


def test_right_frequencies_pass() -> None:
    test = frequency_test("x", draws(JOINT, 4000), JOINT)
    assert test.p_value > 0.001
    assert test.detail["draws"] == 4000
    assert test.detail["unlisted"] == 0


def test_wrong_frequencies_fail() -> None:
    wrong = {(1,): 0.5, (2, 3): 0.35, (2, 4): 0.15}
    assert frequency_test("x", draws(wrong, 4000), JOINT).p_value < 1e-6


def test_joint_frequencies_see_a_dependence_that_marginals_hide() -> None:
    independent = {(a, b): 0.25 for a in (1, 2) for b in (1, 2)}
    tied = {(1, 1): 0.3, (2, 2): 0.3, (1, 2): 0.2, (2, 1): 0.2}
    assert frequency_test("x", draws(tied, 4000), independent).p_value < 1e-6


def test_contingency() -> None:
    generator = random.Random(1)
    pairs = [(generator.randrange(4), generator.randrange(3)) for _ in range(3000)]
    _, degrees, p_value = contingency(pairs)
    assert degrees == 6
    assert p_value > 0.001
    assert contingency([(a, a) for a, _ in pairs])[2] < 1e-12
    assert contingency([(0, 0)] * 50) == (0.0, 0, 1.0)


def test_rare_categories_are_pooled() -> None:
    generator = random.Random(2)
    pairs = [(generator.randrange(2), generator.randrange(2)) for _ in range(1000)] + [(7, 8), (9, 10)]
    assert contingency(pairs)[1] == 4  # two categories and "rare" on both sides


def test_upper_tail() -> None:
    assert upper_tail(3.841458820694124, 1) == pytest.approx(0.05, abs=1e-9)
    assert upper_tail(18.307038053275146, 10) == pytest.approx(0.05, abs=1e-9)


def test_entropy() -> None:
    assert entropy([0.5, 0.5]) == pytest.approx(0.6931472)
    assert entropy([1.0, 0.0]) == 0.0


def test_the_noise_is_independent_and_a_repeated_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "_NOISE_VALUES", 1 << 17)
    found = distribution.noise_tests(vocab_size=777)
    assert len(found) == 5
    assert all(test.p_value > 1e-4 for test in found)
    fixed = distribution.token_noise
    monkeypatch.setattr(
        distribution, "token_noise", lambda seed, window, samples, *rest: fixed(seed, window, [0], *rest)
    )
    broken = {test.name: test.p_value for test in distribution.noise_tests(vocab_size=777)}
    assert broken["noise of different samples is independent"] == 0.0
    assert broken["noise of different windows is independent"] > 1e-4


def test_uniform_bins_cover_the_unit_interval() -> None:
    values = torch.tensor([1e-12, 0.5, 1 - 1e-12], dtype=torch.float64)
    assert distribution._noise_test("x", values, values).detail["values"] == 3
