"""`make speed`: its figures, what it calls worse, and the results that ship."""

from pathlib import Path

import pytest

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.target.checkpoint import SHIPPED, VLMFiles, target_identity
from tests.helpers.speed_ratios import RATIOS, TEXTS, speed_figures, worse
from tests.speed import ratios

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "speed_tiny_cpu.json"
ARMS = {arm for ratio in RATIOS.values() for arm in (ratio.arm, ratio.base)}


def times(turns=2 * TEXTS, **changes):
    """Of every arm 10 ms a turn, but for `changes`."""
    return {arm: [10.0] * turns for arm in ARMS} | changes


def test_a_figure_is_the_mean_of_the_texts_medians():
    slow = [5.0 + text for text in range(TEXTS)] + [50.0] * TEXTS + [6.0 + text for text in range(TEXTS)]
    found = speed_figures(times(3 * TEXTS, decode_host=slow))
    medians = [(6.0 + text) / 10 for text in range(TEXTS)]
    assert found["figures"]["decode_host_over_autoregressive"] == pytest.approx(sum(medians) / TEXTS)
    assert found["figures"]["window_over_plain"] == 1
    low, high = found["spread"]["decode_host_over_autoregressive"]
    assert low <= found["figures"]["decode_host_over_autoregressive"] <= high and low < high


@pytest.mark.parametrize("name", RATIOS)
def test_what_is_slower_than_its_tolerance_is_worse(name):
    kept, tolerance = dict.fromkeys(RATIOS, 0.5), RATIOS[name].tolerance
    assert worse(kept | {name: 0.5 * (1 + tolerance) - 0.001}, kept) == []
    assert worse(kept | {name: 0.5 * (1 + tolerance) + 0.001}, kept) == [name]
    assert worse(kept | {name: 0.1}, kept) == []


def test_a_ratio_that_is_not_kept_is_an_error():
    with pytest.raises(ValueError, match=r"no window_over_plain; renew them with --write"):
        worse({"window_over_plain": 1.0}, {})


def test_turns_hold_every_text_equally_often():
    assert ratios.RESULTS == RESULTS
    with pytest.raises(ValueError, match="turns is 9; it must be a multiple of 8"):
        ratios.SpeedConfig(9)


def test_the_shipped_ratios_follow_from_their_times_and_are_the_shipped_targets():
    shipped = read_json(RESULTS)
    assert set(shipped["raw"]) == ARMS
    assert {name: shipped[name] for name in ("figures", "spread")} == speed_figures(shipped["raw"])
    assert shipped["figures"]["decode_host_over_autoregressive"] < 0.6
    assert shipped["figures"]["decode_device_over_autoregressive"] < 0.6
    assert shipped["figures"]["window_over_plain"] < 1
    made = shipped["provenance"]
    assert made["command"] == "ratios.py --write" and len(made["revision"]) == 40
    assert made["parents"]["target"] == target_identity(SHIPPED, VLMFiles(SHIPPED / "vlm")).hash
