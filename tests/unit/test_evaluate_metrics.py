"""Numbers over clips: pooled, paired, counted."""

from __future__ import annotations

from typing import Any

import pytest

from alpamayo_dflash.evaluate import metrics
from alpamayo_dflash.evaluate.rows import ArmRow, ClipRow


def arm(decode: float, tokens: int = 10) -> ArmRow:
    total = 55.0 + decode
    return {"prefill_ms": 50.0, "decode_ms": decode, "action_ms": 5.0, "total_ms": total, "tokens": tokens}


def row(clip: str, slow: float, fast: float, after_first: int, passes: int) -> ClipRow:
    return {
        "clip_id": clip,
        "prompt_tokens": 100,
        "coc": ["Keep lane."],
        "arms": {"transformers": arm(2 * slow), "autoregressive": arm(slow), "dflash": arm(fast)},
        "acceptance": {
            "tokens_after_first": after_first,
            "passes": passes,
            "drafted": 7 * passes,
            "accepted": after_first - passes,
        },
    }


def test_acceptance_is_pooled_not_averaged() -> None:
    rows = [row("a", 10, 5, after_first=30, passes=3), row("b", 10, 5, after_first=10, passes=10)]
    pooled = metrics.pooled_acceptance(rows)
    assert pooled["acceptance_length"] == round(40 / 13, 4)  # the mean of 10 and 1 would be 5.5
    assert pooled["acceptance_rate"] == round((27 + 0) / (21 + 70), 4)
    assert pooled["passes_per_coc"] == 6.5


def test_speedup_is_the_median_of_paired_ratios() -> None:
    rows = [row("a", 10, 10, 1, 1), row("b", 20, 10, 1, 1), row("c", 300, 100, 1, 1)]
    found = metrics.speedups(rows)
    assert found["decode_vs_autoregressive"] == 2.0  # ratios 1, 2, 3; the ratio of medians would be 2 too ...
    assert found["decode_vs_transformers"] == 4.0
    rows[0]["arms"]["dflash"] = arm(1)
    assert metrics.speedups(rows)["decode_vs_autoregressive"] == 3.0  # 10, 2, 3; of medians: 20 / 10


def test_speedup_leaves_out_a_clip_without_decode_time() -> None:
    rows = [row("a", 10, 5, 1, 1), row("b", 10, 0, 0, 0)]
    assert metrics.speedups(rows)["decode_vs_autoregressive"] == 2.0


def test_summary_has_the_keys_that_the_issue_names() -> None:
    done = row("a", 10, 5, 9, 3)
    done["identity"] = {"greedy": True, "sampled": False, "autoregressive_equals_transformers": True}
    done["named"] = {"manoeuvre": True, "cause": False}
    done["trajectory"] = {"min_ade_m": 1.0, "constant_velocity_ade_m": 2.0}
    done["parts_ms"] = {"draft": 1.0, "verify": 7.0, "sampling": 1.0, "cache": 0.5, "other": 0.5}
    result = metrics.evaluation_summary([done], [{"clip_id": "b", "error": "no frames"}], attempted=2)
    assert {key: result["clips"][key] for key in ("attempted", "done", "failed")} == {
        "attempted": 2,
        "done": 1,
        "failed": 1,
    }
    lossless = result["lossless"]
    assert (lossless["greedy_identical"], lossless["sampled_identical"], lossless["of"]) == (1, 0, 1)
    assert set(result["arms"]) == {"transformers", "autoregressive", "dflash"}
    for times in result["arms"].values():
        assert {"prefill_ms", "decode_ms", "action_ms", "total_ms", "tokens"} <= set(times)
    assert result["speedup"]["decode_vs_autoregressive"] == 2.0
    assert result["coc_names"] == {"manoeuvre": 1.0, "cause": 0.0, "both": 0.0, "of": 1}
    assert result["decode_parts"]["verify"] == {"ms": 7.0, "share": 0.7}
    assert result["trajectory"]["constant_velocity_min_ade_m"] == 2.0


def test_no_clip_done_is_an_error_with_the_first_reason() -> None:
    with pytest.raises(ValueError, match=r"none of 1 clips .* b: no frames"):
        metrics.evaluation_summary([], [{"clip_id": "b", "error": "no frames"}], attempted=1)


def test_parts_that_a_loop_does_not_tell_apart_are_left_out() -> None:
    rows: Any = [
        {"parts_ms": {"draft": 0.0, "verify": 0.0, "sampling": 0.0, "cache": 0.0, "round": 9.0, "other": 1.0}}
    ]
    assert metrics.parts_summary(rows) == {
        "round": {"ms": 9.0, "share": 0.9},
        "other": {"ms": 1.0, "share": 0.1},
    }
    # Rows of an earlier run, continued.
    rows = [{"parts_ms": {"draft": 1.0, "verify": 3.0, "sampling": 0.0, "cache": 0.0, "other": 0.0}}]
    assert list(metrics.parts_summary(rows) or ()) == ["draft", "verify"]
