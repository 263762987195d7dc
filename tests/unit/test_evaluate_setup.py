"""Which clips are taken, when transformers' generation stops, and what an output's difference is called."""

from __future__ import annotations

import pytest
import torch

from alpamayo_dflash.clips.lists import take
from alpamayo_dflash.evaluate.hardness import coc_tokens, figures_of
from alpamayo_dflash.evaluate.lossless import difference
from alpamayo_dflash.evaluate.reference import MaskIds, OneAfter


def test_taking_clips_depends_on_their_ids_alone() -> None:
    ids = [f"clip-{number}" for number in range(40)]
    ten = take(ids, 10)
    assert take(ids[::-1], 10) == ten
    assert take(ids, 20)[:10] == ten
    assert sorted(take(ids, None)) == sorted(ids)
    assert ten != ids[:10]


def test_more_clips_than_there_are() -> None:
    with pytest.raises(ValueError, match="num_samples is 3, but there are 2 clips"):
        take(["a", "b"], 3)


def test_generation_ends_one_token_after_the_stop() -> None:
    stop = OneAfter(token=9, prompt_length=2)
    ids = torch.tensor([[9, 9, 1, 9, 3], [9, 9, 1, 2, 9], [9, 9, 1, 2, 3]])
    assert stop(ids, torch.empty(0)).tolist() == [True, False, False]


def test_masked_ids_cannot_be_chosen() -> None:
    first: list[str] = []
    mask = MaskIds(range(1, 3), lambda: first.append("came"))
    scores = torch.zeros(1, 5)
    for _ in range(2):
        assert mask(torch.empty(0), scores)[0].tolist() == [0.0, -torch.inf, -torch.inf, 0.0, 0.0]
    assert scores.sum() == 0  # the input is left alone
    assert first == ["came"]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([[1, 2, 3], [4]], "none"),
        ([[1, 2, 3], [5]], "sample 1, position 0: 4 expected, 5 found"),
        ([[1, 2], [4]], "sample 0, position 2: 3 expected, None found"),
    ],
)
def test_where_outputs_part(found: list[list[int]], text: str) -> None:
    assert difference([[1, 2, 3], [4]], found) == text


def test_coc_tokens_leave_the_end_marks_out() -> None:
    assert coc_tokens([5, 6, 90, 91], cot_end=90) == 2
    assert coc_tokens([5, 6], cot_end=90) == 2


def test_world_figures_compare_two_samples_of_a_clip() -> None:
    responses = [[("Stop.", 2), ("Stop.", 2)], [("Go", 30), ("Stop.", 2)], [("Go", 30)]]
    figures = figures_of(responses)
    assert figures["differ"] == 0.5
    assert figures["long"] == pytest.approx(2 / 3, abs=1e-4)
    assert figures["period"] == pytest.approx(1 / 3, abs=1e-4)
