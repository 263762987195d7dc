import random

import pytest

from alpamayo_dflash.evaluate.distribution import chi_square

JOINT = {(1,): 0.5, (2, 1): 0.3, (2, 2): 0.15, (3,): 0.049}


def draw(joint, count, seed=0):
    texts = [*joint, (99,)]
    weights = [*joint.values(), 1 - sum(joint.values())]
    counts = {}
    for text in random.Random(seed).choices(texts, weights, k=count):
        counts[text] = counts.get(text, 0) + 1
    return counts


def test_right_frequencies_pass():
    results = [chi_square(draw(JOINT, 4000, seed), JOINT).p_value for seed in range(40)]
    assert min(results) > 1e-3
    assert sum(p < 0.5 for p in results) in range(8, 33)


def test_wrong_frequencies_fail():
    wrong = {(1,): 0.45, (2, 1): 0.35, (2, 2): 0.15, (3,): 0.049}
    assert chi_square(draw(wrong, 4000), JOINT).p_value < 1e-3


def test_texts_that_cannot_occur_count_against_it():
    complete = JOINT | {(99,): 0.001}
    counts = draw(JOINT, 4000)
    assert chi_square(counts, complete).p_value > 1e-3
    counts[(7, 7)] = 1
    assert chi_square(counts, complete).p_value == 0
    assert chi_square(counts, JOINT).p_value > 1e-3  # here the distribution leaves room for it


def test_p_value_is_chi_squares():
    # 3.841 is the 95% point at one degree of freedom.
    got = chi_square({(0,): 500, (1,): 500}, {(0,): 0.469, (1,): 0.531})
    assert got.degrees == 1
    assert got.statistic == pytest.approx(3.859, abs=0.01)
    assert got.p_value == pytest.approx(0.0495, abs=0.001)


def test_too_few_draws():
    with pytest.raises(ValueError, match="3 observations"):
        chi_square({(1,): 3}, JOINT)
