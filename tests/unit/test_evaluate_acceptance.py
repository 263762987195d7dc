"""Counts of decoding by clip, and what is made of them."""

import pytest

from alpamayo_dflash.evaluate.acceptance import PEERS, ClipCounts, length_ratio, pooled, study_figures
from alpamayo_dflash.report.tables import study_tables

TOKENS = (10, 12, 14, 16)


def test_lengths_are_pooled_over_clips():
    assert ClipCounts(TOKENS, (2, 3, 4, 4)).length == 52 / 13
    both = pooled([ClipCounts(TOKENS, (2, 3, 4, 4)), ClipCounts(TOKENS, (3, 3, 3, 3))])
    assert both == ClipCounts((20, 24, 28, 32), (5, 6, 7, 7))
    with pytest.raises(ValueError, match="no pass on 2 clips"):
        _ = ClipCounts((0, 0), (0, 0)).length


def test_the_interval_is_of_paired_clips():
    """Clips that differ alike in both leave no doubt about the ratio; others do."""
    slow = ClipCounts(TOKENS, (5, 6, 7, 8))
    fast = ClipCounts(TOKENS, (10, 12, 14, 16))
    assert length_ratio(slow, fast) == pytest.approx((2.0, 2.0, 2.0))
    ratio, low, high = length_ratio(slow, ClipCounts(TOKENS, (5, 12, 7, 16)))
    assert ratio == pytest.approx(40 / 26) and 1.0 <= low < ratio < high <= 2.0
    with pytest.raises(ValueError, match="4 clips beside 1"):
        length_ratio(slow, ClipCounts((3,), (1,)))


def unit(recipe, seed, passes, **options):
    return {
        "recipe": recipe,
        "data": "all",
        "seed": seed,
        "options": options,
        "steps": 5,
        "train_s": 2.0,
        "validation": {"tokens": 60, "passes": 20},
        "sampled_passes": passes,
        "greedy_passes": [2, 2],
    }


def results():
    units = [
        unit("dflash", 0, [6, 6]),
        unit("dflash", 1, [4, 8]),
        unit("gru kl", 0, [5, 5], previous_head="gru"),
    ]
    return {
        "test_clips": ["a", "b"],
        "validation_clips": ["c", "d"],
        "decoding_seeds": 2,
        "validation_seeds": 1,
        "sampled_tokens": [20, 28],
        "greedy_tokens": [10, 14],
        "ceilings": {"text": [4, 4], "independent": [6, 6]},
        "units": {str(index): each for index, each in enumerate(units)},
    }


def test_figures_of_a_study():
    found = study_figures(results())
    assert found["ceilings"] == {"text": 6.0, "independent": 4.0}
    rows = found["all"]["recipes"]
    assert rows["dflash"]["seeds"] == 2 and rows["dflash"]["by_seed"] == [4.0, 4.0]
    assert rows["gru kl"]["acceptance_length"] == 4.8 and rows["gru kl"]["ceiling_share"] == 0.8
    assert rows["gru kl"]["passes_per_coc"] == 2.5 and rows["gru kl"]["greedy_acceptance_length"] == 6.0
    assert rows["gru kl"]["over_dflash"][0] == 1.2
    assert found["all"]["best_at_demo_steps"] == found["all"]["best"]
    assert found["ceiling_share_best"] == found["ceiling_share_demo_steps"] == rows["dflash"]["ceiling_share"]
    assert found["passes_per_coc"] == 3.0 and "best_over_prototype" not in found
    assert "over_prototype" not in rows["gru kl"] and "ms_per_coc" not in rows["gru kl"]


def test_the_best_recipe_is_the_one_of_least_ms():
    """A head that accepts more but costs more than it saves is not chosen."""
    study = (
        results()
        | {"round_rows": 10}
        | {"bench_raw": {"verify_ms": {"10": [5.0]}, "picks_ms": {"no": [0.5], "gru": [5.5]}}}
    )
    study["units"]["2"]["validation"] = {"tokens": 60, "passes": 15}
    found = study_figures(study)["all"]
    assert found["recipes"]["gru kl"]["ms_per_coc"] == 26.25
    assert found["recipes"]["gru kl"]["validation_acceptance_length"] == 4.0
    assert found["best"] == "dflash"
    study["bench_raw"]["picks_ms"]["gru"] = [0.6]
    assert study_figures(study)["all"]["best"] == "gru kl"


def test_the_studys_table():
    study = results()
    study["units"]["2"]["validation"] = {"tokens": 60, "passes": 15}
    (table,) = study_tables({"results": "somewhere", **study_figures(study)})
    assert table.rows[0][:3] == ("dflash", "2", "5")
    assert table.rows[1][0] == "gru kl (best)" and table.rows[1][3:5] == ("4.80", "80.0 %")
    assert table.rows[1][-2] == "–" and table.rows[1][-1].startswith("1.20 [")


def test_the_best_of_ours_over_each_peer():
    """Peers are no candidates for the best, and are compared on the same clips, whatever the seeds."""
    study = results()
    assert "best_over_speculators" not in study_figures(study)
    study["units"] |= {
        "3": unit(PEERS["equal-steps"], 0, [8, 8]) | {"validation": {"tokens": 60, "passes": 5}},
        "4": unit(PEERS["equal-time"], 0, [6, 6]),
        "5": unit(PEERS["equal-time"], 1, [4, 4]),
        "6": unit(PEERS["equal-time"], 0, [4, 4]) | {"data": "tenth"},
    }
    study["units"]["2"]["validation"] = {"tokens": 60, "passes": 15}
    found = study_figures(study)
    assert found["all"]["best"] == "gru kl" and found["tenth"]["best"] is None
    assert found["best_over_speculators"] == {
        "all": {"equal_steps": [1.6, 1.6, 1.6], "equal_time": [1.0, 1.0, 1.0]}
    }
    assert found["all"]["recipes"][PEERS["equal-steps"]]["acceptance_length"] == 3.0


def test_the_ratio_to_a_peer_has_an_interval():
    study = results()
    study["units"]["3"] = unit(PEERS["defaults"], 0, [10, 4])
    ratio, low, high = study_figures(study)["best_over_speculators"]["all"]["defaults"]
    assert ratio == pytest.approx(14 / 12, abs=1e-4) and low < ratio < high


def test_more_steps_are_no_match_for_peers_of_as_many():
    """The best of all may have been trained longer; a peer is set beside the best of the fewest steps."""
    study = results()
    study["units"]["2"] |= {"steps": 15, "validation": {"tokens": 60, "passes": 10}}
    peer = unit(PEERS["equal-steps"], 0, [8, 8])
    study["units"]["3"] = peer
    found = study_figures(study)
    assert (found["all"]["best"], found["all"]["best_at_demo_steps"]) == ("gru kl", "dflash")
    assert found["best_over_speculators"]["all"]["equal_steps"][0] == pytest.approx(16 / 12, abs=1e-4)
