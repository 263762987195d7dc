"""The benchmark of distillation: its figures, and what it refuses."""

import re
import sys

import pytest

from alpamayo_dflash.bench import distill_before
from alpamayo_dflash.bench.config import BenchDistillConfig
from alpamayo_dflash.bench.figures import distill_figures

SMALL = {"target": "random:small", "device": "cpu", "windows": 4, "height": 64, "width": 96}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windows": 6}, "windows is 6; it must be a multiple of 4"),
        ({"windows": 0}, "windows is 0"),
        ({"height": 31}, "height is 31; a video's must be even, and 32 or more"),
        ({"width": 1921}, "width is 1921; a video's must be even"),
        ({"tokens": 1}, "tokens is 1"),
        ({"samples_per_clip": 1}, "samples_per_clip is 1"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"block_size": 1}, "block_size is 1"),
    ],
)
def test_bad_values_are_named(tmp_path, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BenchDistillConfig(tmp_path, **values)


def test_figures_by_hand():
    arms = {
        "before": {"wall_s": 8.0, "prefill_ms": [500.0, 500.0]},
        "autoregressive": {"wall_s": 2.0, "vision_ms": [100.0, 100.0], "prompt_ms": [150.0, 250.0]},
        "replayed": {
            "wall_s": 0.8,
            "vision_ms": [100.0, 100.0],
            "prompt_ms": [140.0, 220.0],
            "emitted": 75,
            "passes": 12,
        },
    }
    assert distill_figures({"windows": 2, "arms": arms}) == {
        "windows_per_s": 2.5,
        "prompt_share_of_wall": 0.7,
        "windows_per_s_ar": 1.0,
        "prompt_share_of_wall_ar": 0.3,
        "windows_per_s_before": 0.25,
        "prompt_share_of_wall_before": 0.125,
        "over_before": 4.0,
        "acceptance_length": 6.25,
    }
    del arms["before"]
    assert "over_before" not in distill_figures({"windows": 2, "arms": arms})


def test_modules_are_found_by_their_names_of_any_time():
    assert distill_before.module("nowhere", "bench.figures") is sys.modules[distill_figures.__module__]
    with pytest.raises(ModuleNotFoundError, match=re.escape("has none of nowhere, nor.here")):
        distill_before.module("nowhere", "nor.here")
