"""The benchmark's arithmetic, its replay, and one small run."""

import numpy as np
import pytest
import torch

from alpamayo_dflash.cli import main as cli
from alpamayo_dflash.decode.replay import Replay, passes, rate_for
from alpamayo_dflash.decode.steps import State
from alpamayo_dflash.evaluate.bench import BenchConfig, coc_quantiles, figures


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
        for text, proposed in zip(texts, replay(state).view(2, 4).tolist(), strict=True):
            equal = [a == b for a, b in zip(proposed, text[length:], strict=False)]
            right = equal.index(False) if False in equal else 4
            assert not any(equal[right:])
            found.add(right)
    assert found == {0, 1, 2, 3, 4}


def test_coc_lengths(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("tokens,steps\n0,5\n10,1\n12,8\n30,1\n")
    assert coc_quantiles(path) == {"p10": 10, "median": 12, "p90": 12, "p99": 30}
    path.write_text("length,count\n")
    with pytest.raises(ValueError, match="tokens and steps"):
        coc_quantiles(path)


def test_figures_are_ratios_of_medians_and_means():
    raw = {
        "block_size": 8,
        "weight_bytes": 2_000_000,
        "read_bytes_per_s": [1e9, 1e9, 5e9],
        "verify_ms": {"8": [3.0, 3.0, 9.0]},
        "draft_ms": {"2 layers": [0.3, 0.3], "5 layers": [1.0]},
        "round_ms": {"1": [4.0], "6": [5.0]},
        "text_ms": {
            "autoregressive_1": [30.0, 34.0],
            "speculative_1": [8.0],
            "speculative_6": [10.0, 14.0],
            "transformers_1": [80.0],
        },
        "prefill_ms": {"project": [2.0], "transformers": [3.0]},
    }
    assert figures(raw) == {
        "verify_8_over_floor": 1.5,
        "draft_over_verify": 0.1,
        "round_overhead": 0.175,
        "round_six_over_one": 1.25,
        "decode_six_over_one": 1.5,
        "decode_vs_autoregressive": 4.0,
        "decode_vs_transformers": 10.0,
        "prefill_vs_transformers": 1.5,
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [({"rows": "8,x"}, "8,x"), ({"block_size": 1}, "block_size"), ({"texts": 1}, "texts")],
)
def test_options_outside_their_range(options, named):
    with pytest.raises(ValueError, match=named):
        BenchConfig(**options)


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    out = tmp_path / "engine.json"
    options = [
        "--target",
        "random:small",
        "--device",
        "cpu",
        "--rows",
        "1,8",
        "--repeats",
        "2",
        "--texts",
        "3",
    ]
    assert cli.main(["bench", *options, "--lossless-prompts", "1", "--out", str(out)]) == 0
    assert '"passed": true' in capsys.readouterr().out
    assert out.exists()
