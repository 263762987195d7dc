import itertools
import json

import pytest

from alpamayo_dflash.layers.choice import choose_taps, progress, read_choice, reasons


def brute_force(progress_of, count):
    """Every set of layers, cheapest first, later layers first among equals."""

    def cost(taps):
        return round(sum(abs(progress_of[tap] - (i + 1) / count) for i, tap in enumerate(taps)), 7)

    sets = list(itertools.combinations(sorted(progress_of), count))
    return min(sets, key=lambda taps: (cost(taps), [-tap for tap in reversed(taps)]))


@pytest.mark.parametrize("seed", range(20))
def test_dynamic_programming_finds_the_cheapest_set(seed):
    import numpy as np

    generator = np.random.default_rng(seed)
    # a few equal values, so that ties occur
    progress_of = {layer: float(value) for layer, value in enumerate(generator.integers(0, 7, 10) / 6)}
    for count in (1, 3, 5, 10):
        assert choose_taps(progress_of, count) == brute_force(progress_of, count)


def test_even_progress_gives_even_taps():
    assert choose_taps({layer: layer / 34 for layer in range(35)}, 5) == (7, 14, 20, 27, 34)


def test_late_progress_gives_late_taps():
    late = {layer: 0.1 * layer / 28 if layer < 28 else 0.1 + 0.9 * (layer - 27) / 7 for layer in range(35)}
    taps = choose_taps(late, 5)
    assert taps[-1] == 34
    assert all(tap >= 26 for tap in taps)


def test_flat_progress_takes_the_last_layers():
    assert choose_taps(dict.fromkeys(range(6), 1.0), 2) == (4, 5)


def test_taps_are_distinct_and_ascending_even_where_one_layer_fits_all_levels():
    taps = choose_taps({0: 0.0, 1: 0.0, 2: 1.0, 3: 0.0}, 3)
    assert list(taps) == sorted(set(taps))


def test_too_few_candidates():
    with pytest.raises(ValueError, match="cannot choose 3 taps among 2"):
        choose_taps({0: 0.0, 1: 1.0}, 3)


def test_progress_scales_both_scores():
    found = progress([0.0, 0.5, 1.0, 1.0], {0: 9.0, 1: 8.0, 2: 5.0}, [0, 1, 2])
    assert found == {0: 0.0, 1: pytest.approx((0.5 + 0.25) / 2), 2: 1.0}


def test_progress_of_equal_scores_is_defined():
    assert progress([1.0, 1.0], {0: 3.0, 1: 3.0}, [0, 1]) == {0: 1.0, 1: 1.0}


def test_reasons_name_every_tap():
    texts = reasons([0, 2], {0: 0.4, 2: 1.0}, [0.1, 0.2, 0.9], {0: 3.0, 2: 1.0})
    assert [text.split(":")[0] for text in texts] == ["layer 0", "layer 2"]


def test_read_choice_takes_a_file_or_its_folder(tmp_path):
    (tmp_path / "layers.json").write_text(json.dumps({"target_layers": [1, 4, 6]}))
    assert read_choice(tmp_path) == read_choice(tmp_path / "layers.json") == (1, 4, 6)


@pytest.mark.parametrize(
    "bad", [{}, [], {"target_layers": []}, {"target_layers": [2, 2]}, {"target_layers": ["1"]}]
)
def test_read_choice_refuses_what_is_no_choice(tmp_path, bad):
    (tmp_path / "layers.json").write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=r"layers\.json"):
        read_choice(tmp_path)


def test_read_choice_names_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"layers\.json: no such file"):
        read_choice(tmp_path)
