"""Rounds with a second report of what target and draft thought, captured (run by hand: `pytest -m gpu`)."""

import pytest
import torch

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.observer import Recorder
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from tests.helpers.random_target import random_draft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WINDOWS = 3


@pytest.fixture(scope="module")
def views():
    return [view for view, _ in held_out(WINDOWS, seed=9)]


def traced(decoder, view, *, scores, temperature, samples):
    recorder = Recorder(scores=scores)
    options = {"temperature": temperature, "num_traj_samples": samples, "seed": 3, "trajectories": False}
    result = decoder.generate(view, observer=recorder, **options)
    return result, recorder


@pytest.mark.parametrize("head", [None, "gru"])
@pytest.mark.parametrize("few", [None, 600])
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_round_with_scores_writes_the_same(views, *, head, few, samples, temperature, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    target = Alpamayo.from_pretrained("tiny", dtype=dtype, device="cuda")
    draft = random_draft(target, previous_head=head, previous_size=16, draft_vocab_size=few)
    if few is not None:
        draft.draft_token_ids.copy_(torch.arange(few) * 2)
    decoder = SpeculativeDecoder(target, draft.to(dtype), DecodeConfig(loop="device"))
    choices = {"temperature": temperature, "samples": samples}
    for view in views:
        plain, without = traced(decoder, view, scores=False, **choices)
        found, recorder = traced(decoder, view, scores=True, **choices)
        assert found.token_ids == plain.token_ids
        assert [[(part.proposed, part.emitted) for part in each.samples] for each in without.rounds] == [
            [(part.proposed, part.emitted) for part in each.samples] for each in recorder.rounds
        ]
        parts = [part for each in recorder.rounds for part in each.samples]
        assert any(part.scores.draft for part in parts)
        for part in parts:
            places = [part.scores.target[index] for index in part.scores.at]
            assert tuple(place.chosen for place in places) == part.emitted
            assert all(place.chosen_logit >= place.nucleus_logit for place in places)
            assert all(list(place.logits) == sorted(place.logits, reverse=True) for place in places)
            if temperature == 0:
                assert all(place.chosen_rank == 0 for place in places)
    kinds = {shape.scored: round_ for shape, round_ in decoder.device_rounds.kept.items()}
    assert set(kinds) == {False, True}
    assert all(round_._graph is not None for round_ in kinds.values())  # both are captured
    if dtype == torch.float32 and samples == 1:
        host = SpeculativeDecoder(target, draft, DecodeConfig(loop="host"))
        _, other = traced(host, views[-1], scores=True, **choices)
        for mine, theirs in zip(recorder.rounds, other.rounds, strict=True):
            for name in ("target", "draft"):
                pair = (getattr(each.samples[0].scores, name) for each in (mine, theirs))
                for one, two in zip(*pair, strict=True):
                    assert one.chosen == two.chosen
                    assert one.logits == pytest.approx(two.logits, abs=2e-2)
                    assert one.nucleus_mass == pytest.approx(two.nucleus_mass, abs=1e-2)
