"""The benchmark of a target in FP8 beside the same as its checkpoint holds it: figures, table, options."""

import json

import pytest

from alpamayo_dflash.bench import expert, formats
from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.figures import format_figures, spread
from alpamayo_dflash.bench.floors import format_floors
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


def test_the_tiny_target_on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(expert, "_PROMPT", 64)  # of the expert's part alone
    out = tmp_path / "beside.json"
    options = {
        "repeats": 2,
        "texts": 3,
        "lossless_prompts": 1,
        "draft_layers": "1",
        "window_tokens": 6,
        "acceptance": 3.0,
    }
    config = BenchConfig(
        target="tiny", device="cpu", beside=True, transformers=False, weights="fp8", out=out, **options
    )
    found = formats.run(config)
    assert found["passed"] and found["lossless"] == {"prompts": 1, "texts": 4, "equal": 4, "row_width": 8}
    assert found["target_weights"]["fp8"] == {"text": "fp8", "expert": "float32", "vision": "float32"}
    assert set(found["target_weights"]["checkpoint"].values()) == {"float32"}
    kept = json.loads(out.read_text())
    assert kept["figures"] == format_figures(kept["raw"])
    assert {"vision_ms", "prompt_ms", "verify_8_ms", "expert_6_ms", "window_ms"} <= kept["beside"].keys()
    assert kept["floors"] == format_floors(kept["raw"])
    assert {row["arm"] for row in kept["floors"]["rows"]} == {"fp8", "checkpoint"}
    parts, floors = bench_tables(kept)
    assert len(floors.rows) == 2 * (len(parts.rows) - 1)  # whole windows have none
    rounds = kept["raw"]["window_rounds"]
    assert all(len(times) == len(rounds) for times in kept["raw"]["window_ms"].values())
