"""The benchmark of a target in FP8 beside the same as its checkpoint holds it: figures, table, options."""

import pytest

from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.figures import format_figures, spread
from alpamayo_dflash.report.tables import bench_tables

RAW = {
    "read_bytes_per_s": [1e9, 2e9],
    "vision_ms": {"fp8": [1.0, 3.0, 2.0], "checkpoint": [4.0, 4.0, 5.0]},
    "expert_1_ms": {"fp8": [6.0], "checkpoint": [8.0]},
    "expert_6_ms": {"fp8": [6.0], "checkpoint": [6.0]},
    "window_parts_ms": {"fp8": {"vision": [1.0]}, "checkpoint": {"vision": [2.0]}},
}


def test_figures_are_ratios_of_medians():
    expected = {"vision_over_bf16": 0.5, "expert_over_bf16": 0.75, "expert_6_over_bf16": 1.0}
    assert format_figures(RAW) == expected
    low, high = spread(RAW, format_figures)["vision_over_bf16"]
    assert low <= 0.5 <= high


def test_table():
    beside = {"vision_ms": {"fp8": 2.0, "checkpoint": 4.0}, "expert_1_ms": {"fp8": 6.0, "checkpoint": 8.0}}
    (table,) = bench_tables({"beside": beside, "gpu": None})
    assert table.rows == (("vision", "2.00", "4.00", "0.500"), ("expert", "6.00", "8.00", "0.750"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --weights fp8"),
        ({"weights": "fp8", "window": True}, "benchmarks of their own"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(beside=True, transformers=False, **options)


def test_texts_are_a_windows():
    config = BenchConfig(beside=True, transformers=False, expert_weights="fp8")
    assert config.text_tokens == config.window_tokens
