"""The benchmark's arithmetic, its replay, and what it refuses."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from alpamayo_dflash.bench.cards import cards_of
from alpamayo_dflash.bench.clocks import PartClock, RoundClock
from alpamayo_dflash.bench.config import BenchConfig, BenchKernelsConfig
from alpamayo_dflash.bench.figures import figures, spread, window_figures, window_parts
from alpamayo_dflash.bench.floors import (
    TextShape,
    draft_of,
    expert_work,
    floors,
    format_floors,
    window_floors,
)
from alpamayo_dflash.bench.profile import short_name
from alpamayo_dflash.bench.replay import Replay, passes, rate_for
from alpamayo_dflash.bench.setup import coc_quantiles
from alpamayo_dflash.cli import main as cli
from alpamayo_dflash.common.artefacts import write_json
from alpamayo_dflash.decode.observer import RoundTrace
from alpamayo_dflash.decode.steps import State


def test_expected_passes():
    assert passes(16, 1.0, 8) == 2
    assert passes(16, 0.0, 8) == 16
    # Two tokens, block 2: the first pass emits both with the rate's probability.
    assert passes(2, 0.25, 2) == pytest.approx(0.25 * 1 + 0.75 * 2)


@pytest.mark.parametrize("acceptance", [1.0, 3.5, 6.25, 8.0])
def test_the_rate_gives_the_acceptance(acceptance):
    rate = rate_for(acceptance, 16, 8)
    assert 16 / passes(16, rate, 8) == pytest.approx(acceptance, abs=1e-6)
    random = np.random.default_rng(0)
    total = 0
    for _ in range(2000):
        left = 16
        while left > 0:
            wrong = random.random(7) >= rate
            left -= (int(wrong.argmax()) if wrong.any() else 7) + 1
            total += 1
    assert 16 * 2000 / total == pytest.approx(acceptance, rel=0.03)


def test_an_acceptance_that_cannot_be():
    with pytest.raises(ValueError, match="9"):
        rate_for(9.0, 16, 8)


def test_a_replay_is_right_up_to_a_place_and_wrong_behind_it():
    replay = Replay(samples=2, length=30, block=5, rate=0.6, vocab=50, device=torch.device("cpu"))
    texts = [list(range(10, 40)), list(range(20, 50))]
    replay.load(texts, 0)
    state = State(samples=2, block=5, width=10, per_sample=40, slots=80, device=torch.device("cpu"))
    found = set()
    for length in range(1, 25):
        state.lengths.fill_(length)
        for text, proposed in zip(texts, replay(state)[0].tolist(), strict=True):
            equal = [a == b for a, b in zip(proposed, text[length:], strict=False)]
            right = equal.index(False) if False in equal else 4
            assert not any(equal[right:])
            found.add(right)
    assert found == {0, 1, 2, 3, 4}


def test_a_text_too_long_to_replay():
    replay = Replay(samples=1, length=10, block=4, rate=0.6, vocab=50, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="15 tokens; there is room for 14"):
        replay.load([list(range(15))], 0)


def test_coc_lengths(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("tokens,steps\n0,5\n10,1\n12,8\n30,1\n")
    assert coc_quantiles(path) == {"p10": 10, "median": 12, "p90": 12, "p99": 30}
    path.write_text("length,count\n")
    with pytest.raises(ValueError, match="tokens and steps"):
        coc_quantiles(path)


def raw_timings():
    return {
        "block_size": 8,
        "coc_tokens": 17,
        "prompt_tokens": 100,
        "weight_bytes": 2_000_000,
        "shape": {
            "layers": 2,
            "hidden": 64,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "mlp": 128,
            "vocab": 1000,
            "element_bytes": 2,
        },
        "draft_shape": {"taps": 3, "block_size": 8, "context_len": 16, "vocab": 50},
        "vision_bytes": 5000,
        "vision_operations": 7_000_000,
        "read_bytes_per_s": [1e9, 1e9, 5e9],
        "product_flop_per_s": [1e12, 1e12],
        "verify_ms": {"8": [3.0, 3.0, 9.0]},
        "draft_ms": {"2 layers": [0.3, 0.3], "5 layers, 6 samples": [1.0]},
        "round_ms": {"1": [4.0], "6": [5.0]},
        "text_ms": {
            "autoregressive_1": [30.0, 34.0],
            "speculative_1": [8.0],
            "speculative_6": [10.0, 14.0],
            "transformers_1": [80.0],
        },
        "text_rounds": {
            "autoregressive_1": [16, 16],
            "speculative_1": [2],
            "speculative_6": [3, 4],
            "transformers_1": [16],
        },
        "vision_ms": {"project": [1.0]},
        "prefill_ms": {"project": [2.0], "transformers": [3.0]},
    }


FIGURES = {
    "verify_8_over_floor": 1.5,
    "draft_over_verify": 0.1,
    "round_overhead": 0.175,
    "round_six_over_one": 1.25,
    "decode_six_over_one": 1.5,
    "decode_vs_autoregressive": 4.0,
    "decode_vs_transformers": 10.0,
    "prefill_vs_transformers": 1.5,
}


def test_figures_are_ratios_of_medians_and_means():
    assert figures(raw_timings()) == FIGURES


def test_picks_with_a_head_have_figures_of_their_own():
    raw = raw_timings() | {"picks_ms": {"no": [0.3, 0.6, 0.9], "gru": [1.2]}}
    assert figures(raw) == FIGURES | {"picks_no_head_over_verify": 0.2, "picks_gru_head_over_verify": 0.4}


def test_texts_of_transformers_that_end_earlier_are_taken_at_our_passes():
    raw = raw_timings()
    raw["text_rounds"]["transformers_1"] = [8]
    assert figures(raw) == FIGURES | {"decode_vs_transformers": 20.0}


def test_a_texts_first_round_is_not_timed():
    clock = RoundClock()
    for index in (0, 1, 2, 0, 1):
        clock.on_round(RoundTrace(index, 8, ()))
    assert len(clock.times_ms) == 3


def test_compiled_texts_of_transformers_have_a_figure_of_their_own():
    raw = raw_timings()
    raw["text_ms"]["compiled_1"], raw["text_rounds"]["compiled_1"] = [30.0, 34.0], [8, 8]
    assert figures(raw) == FIGURES | {"decode_vs_compiled": 8.0}
    rows = {(row["what"], row["arm"]): row for row in floors(raw)["rows"]}
    assert rows["one token", "compiled"]["measured_ms"] == 4.0
    raw["text_ms"]["compiled_1"] = raw["text_rounds"]["compiled_1"] = []  # it did not run
    assert figures(raw) == FIGURES


def test_parts_are_what_passed_since_the_mark_before(monkeypatch):
    moments = iter([1.0, 1.5, 1.75, 2.75, 10.0, 10.25])
    monkeypatch.setattr("alpamayo_dflash.common.machine.time.perf_counter", lambda: next(moments))
    clock = PartClock(torch.device("cpu"))
    clock.start()
    for part in ("prompt", "vision", "prompt"):
        clock.mark(part)
    assert clock.parts_ms() == {"prompt": 1500.0, "vision": 250.0}
    clock.start()
    clock.mark("action")
    assert clock.parts_ms() == {"action": 250.0}


def test_a_figures_spread_holds_it_and_is_of_what_was_drawn():
    found = spread(raw_timings())
    assert set(found) == set(FIGURES)
    assert found == spread(raw_timings())
    assert found["round_six_over_one"] == [1.25, 1.25]
    assert found["verify_8_over_floor"] == [1.5, 22.5]
    assert found["decode_vs_autoregressive"] == [3.75, 4.25]


def test_floors_are_counted_as_by_hand():
    """Against the plain sums over a layer's matrices, at rates that make bytes bind and at others."""
    raw = raw_timings()
    matrices = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    layer = sum(rows * columns for rows, columns in matrices)
    weights = 2 * layer + 1000 * 64
    cached = 2 * 100 * 2 * 2 * 16 * 2  # layers, prompt, keys and values, heads, width, bytes
    scores = sum(2 * 4 * 100 * 2 * 16 for _ in range(2))  # heads, prompt, product and sum, width
    rows = {(row["what"], row["arm"]): row for row in floors(raw)["rows"]}
    found = rows["pass, 8 rows", "project"]
    assert found["floor_ms"] == pytest.approx((2 * weights + cached) / 1e9 * 1e3, rel=1e-3)
    assert (found["measured_ms"], found["bound"]) == (3.0, "bytes")
    assert found["over_floor"] == pytest.approx(found["measured_ms"] / found["floor_ms"], rel=1e-3)
    one = rows["one token", "autoregressive"]
    assert one["measured_ms"] == 2.0
    draft = 3 * 64 * 64 + 2 * layer + 50 * 64
    expected = (2 * draft + 2 * weights + cached) / 1e9 * 1e3
    assert rows["round", "speculative, replayed"]["floor_ms"] == pytest.approx(expected, rel=1e-3)
    text = rows["CoC of up to 17 tokens", "speculative, replayed"]
    assert text["floor_ms"] == pytest.approx(2 * expected, rel=1e-3)
    raw["product_flop_per_s"] = [1e8, 1e8]
    slow = {(row["what"], row["arm"]): row for row in floors(raw)["rows"]}["pass, 8 rows", "project"]
    assert slow["bound"] == "operations"
    assert slow["floor_ms"] == pytest.approx((2 * weights * 8 + 8 * scores) / 1e8 * 1e3, rel=1e-3)
    prefill = {row["what"]: row for row in floors(raw)["rows"]}["prefill without vision"]
    operations = 2 * 2 * layer * 100 + 2 * 1000 * 64 + 100 * scores / 2
    assert prefill["floor_ms"] == pytest.approx(operations / 1e8 * 1e3, rel=1e-3)


@pytest.mark.parametrize("fp8", [False, True])
def test_floors_of_formats_are_counted_as_by_hand(fp8):
    """In FP8 a layer's weights are a byte each, and their products are done at its own rate."""
    shape = asdict(TextShape(2, 64, 4, 2, 16, 128, 1000, element_bytes=2, fp8=fp8))
    layer = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 128
    counts = {"shape": shape, "expert_shape": shape | {"vocab": 0}, "vision_bytes": 400, "vision_fp8": fp8}
    counts |= {"vision_operations": 3e6, "vision_product_operations": 2e6}
    counts |= {"steps": 10, "waypoints": 5, "expert_prompt_tokens": 20}
    name = "fp8" if fp8 else "checkpoint"
    raw = {
        "read_bytes_per_s": [1e9],
        "product_flop_per_s": [1e9, 1e9],
        "fp8_product_flop_per_s": [2e9, 2e9],
        "prompt_tokens": 100,
        "counts": {name: counts},
        **{part: {"fp8": [3.0], "checkpoint": [3.0]} for part in ("vision_ms", "verify_8_ms", "expert_6_ms")},
        "window_ms": {"fp8": [9.0], "checkpoint": [9.0]},
    }
    vision, pass_, steps = format_floors(raw)["rows"]
    assert vision["floor_ms"] == pytest.approx(2.0 if fp8 else 3.0)
    linear, head = 2 * 2 * layer * 8 / (2e9 if fp8 else 1e9), 2 * 1000 * 64 * 8 / 1e9
    attention = 2 * 4 * 8 * 100 * 64 / 1e9
    assert pass_["floor_ms"] == pytest.approx((linear + head + attention) * 1e3, rel=1e-3)
    linear = 2 * 2 * layer * 30 / (2e9 if fp8 else 1e9)
    assert steps["floor_ms"] == pytest.approx(10 * (linear + 2 * 4 * 30 * 20 * 64 / 1e9) * 1e3, rel=1e-3)
    assert {row["arm"] for row in (vision, pass_, steps)} == {name}


def test_names_of_drafts():
    assert draft_of("2 layers") == (2, 1)
    assert draft_of("5 layers, 6 samples") == (5, 6)


def test_kernels_names_are_short():
    long = "void at::native::(anonymous namespace)::gather_kernel<long, 4>(long*, int)"
    assert short_name(long) == "gather_kernel"
    assert short_name("Memcpy DtoH (Device -> Pinned)") == "Memcpy DtoH"


def test_rows_hold_the_blocks_own():
    assert BenchConfig(rows="1,4,256", block_size=12).row_counts == [1, 4, 12, 256]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rows": "8,x"}, "8,x"),
        ({"rows": "²"}, "rows is '²'"),
        ({"row_width": 0}, "row_width"),
        ({"draft_layers": "0"}, "draft_layers"),
        ({"block_size": 1}, "block_size"),
        ({"block_size": 65}, "block_size"),
        ({"texts": 2}, "texts"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_options_outside_their_range(options, named):
    with pytest.raises(ValueError, match=named):
        BenchConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coc-counts", "nowhere.csv"], "nowhere.csv"),
        (["--acceptance", "9"], "acceptance is 9"),
        (["--target", "random:huge"], "huge"),
        (["--context-len", "5000"], "rounds on the device"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(tmp_path, capsys, options, message):
    out = tmp_path / "engine.json"
    small = ["--target", "random:small", "--device", "cpu"]
    assert cli.main(["bench", *small, *options, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_kernels_are_timed_on_a_gpu_only(tmp_path, capsys):
    pytest.importorskip("triton")
    assert cli.main(["bench-kernels", "--device", "cpu", "--out", str(tmp_path / "kernels.json")]) == 2
    assert "GPU" in capsys.readouterr().err


def window_timings():
    return {
        "steps": 10,
        "expert_bytes": 4_000_000,
        "expert_operations": {"1": 1e9, "6": 6e9},
        "read_bytes_per_s": [4e9, 4e9, 1e9],
        "product_flop_per_s": [1e12, 2e12, 2e12],
        "expert_ms": {"plain_1": [300.0, 310.0], "fused_1": [20.0], "plain_6": [330.0], "fused_6": [45.0]},
    }


def test_a_windows_figures_are_ratios_to_what_must_be_read_or_done():
    raw = window_timings()
    assert window_figures(raw) == {
        "expert_over_floor": 2.0,
        "expert_vs_plain": 15.25,
        "expert_six_over_floor": 1.5,
        "expert_six_vs_plain": 7.3333,
    }
    rows = {(row["what"], row["arm"]): row for row in window_floors(raw)["rows"]}
    one, six = rows["action expert, 10 steps", "fused"], rows["action expert, 10 steps, 6 samples", "fused"]
    assert (one["floor_ms"], one["bound"]) == (10.0, "bytes")
    assert (six["floor_ms"], six["bound"]) == (30.0, "operations")
    assert set(spread(raw, window_figures)) == set(window_figures(raw))
    del raw["expert_ms"]["fused_1"], raw["expert_ms"]["fused_6"]
    assert window_figures(raw) == {}


def test_a_whole_windows_figures():
    raw = window_timings() | {
        "window_ms": {"1": [100.0, 102.0, 101.0], "6": [120.0, 130.0, 121.2]},
        "window_overhead": {"1": [0.02, 0.01, 0.03], "6": [0.5]},
        "equal_window_ms": [100.0] * 99 + [110.0],
        "transformers_window_ms": {"1": [707.0]},
        "compiled_window_ms": {"1": [303.0]},
        "reuse_window_ms": {"twelve": [90.0], "none": [100.0]},
        "preprocess_ms": {"pinned": [3.0], "pageable": [9.0, 8.0], "cpu": [70.0]},
        "vision_ms": {"before": [40.0], "now": [26.0]},
        "prompt_pass_ms": {"before": [76.0], "now": [72.2]},
    }
    assert window_figures(raw) == window_figures(window_timings()) | {
        "window_ms": 101.0,
        "window_six_over_one": 1.2,
        "window_overhead": 0.02,
        "window_p99_over_p50": 1.001,
        "window_vs_transformers": 7.0,
        "window_vs_compiled": 3.0,
        "vision_reuse_over_none": 0.9,
        "preprocess_ms": 3.0,
        "preprocess_pageable_ms": 8.5,
        "vision_over_before": 0.65,
        "prompt_over_before": 0.95,
    }


def test_cards_are_taken_from_results_that_have_whole_windows(tmp_path):
    parts = {"ours_1": {"vision": 29.0}, "transformers_1": {"vision": 60.0}, "floor": {"vision": 15.0}}
    write_json(tmp_path / "window_a.json", {"parts": parts, "gpu": {"name": "Card A"}})
    write_json(tmp_path / "window_b.json", {"figures": {}, "gpu": {"name": "Card B"}})
    assert cards_of(tmp_path.glob("*.json")) == {
        "Card A": {"ours_1": {"vision": 29.0}, "floor": {"vision": 15.0}, "result": "window_a.json"}
    }


def test_a_windows_parts_by_arm():
    raw = {
        "window_ms": {"1": [100.0, 100.0, 130.0], "6": [150.0]},
        "window_parts_ms": {"1": {"vision": [30.0, 28.0], "action": [20.0]}, "6": {"vision": [31.0]}},
        "transformers_window_ms": {"1": [900.0], "6": [2000.0]},
        "transformers_parts_ms": {"1": {"vision": [60.0]}, "6": {"vision": [360.0]}},
        "compiled_window_ms": {"1": [500.0]},
        "compiled_parts_ms": {"1": {"vision": [61.0]}},
    }
    assert window_parts(raw, {"vision": 15.0, "action": 11.5}) == {
        "ours_1": {"vision": 29.0, "action": 20.0, "whole": 100.0},
        "ours_6": {"vision": 31.0, "whole": 150.0},
        "transformers_1": {"vision": 60.0, "whole": 900.0},
        "transformers_6": {"vision": 360.0, "whole": 2000.0},
        "compiled_1": {"vision": 61.0, "whole": 500.0},
        "floor": {"vision": 15.0, "action": 11.5, "whole": 26.5},
    }


def test_a_steps_work_is_counted_as_by_hand():
    shape = TextShape(2, 64, 4, 2, 16, 128, vocab=0, element_bytes=2)
    matrices = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    weights = 2 * sum(rows * columns for rows, columns in matrices)
    found = expert_work(shape, prompt=100, rows=12)
    assert found.bytes == 2 * weights + 2 * 100 * 2 * 2 * 16 * 2
    assert found.operations == 2 * weights * 12 + 2 * 4 * 12 * 100 * 4 * 16


def test_plans_that_are_tried_fit_their_shapes():
    pytest.importorskip("triton")
    from alpamayo_dflash.bench.plans import attention_plans, product_blocks

    for samples in (1, 6, 16):
        assert len(list(attention_plans(128 * samples, 8))) > 20
        for columns, inner, gated in ((4096, 2048, False), (16512, 2048, True), (2048, 8256, False)):
            tried = list(product_blocks(64 * samples, columns, inner, gated=gated))
            assert tried and all(
                inner % each.inner == 0 and inner // each.inner >= each.parts for each in tried
            )
    with pytest.raises(ValueError, match="plans is 'heads'"):
        BenchKernelsConfig(plans="heads")
