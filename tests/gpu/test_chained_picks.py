"""Drafts with a head on previous picks on a CUDA device (run by hand: `pytest -m gpu`)."""

import pytest
import torch

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.observer import Recorder
from alpamayo_dflash.draft.heads import KINDS
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from tests.helpers.random_target import random_draft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WINDOWS = 4


@pytest.fixture(scope="module")
def views():
    return [view for view, _ in held_out(WINDOWS, seed=9)]


def draft_of(target, kind):
    """A random draft whose head has a say."""
    draft = random_draft(target, previous_head=kind, previous_size=16, draft_vocab_size=600)
    draft.draft_token_ids.copy_(torch.arange(600) * 2)
    with torch.no_grad():
        draft.previous.out.weight.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(1))
    return draft


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_captured_rounds_write_the_autoregressive_text(views, kind, samples, temperature):
    """In float32, where both loops are equal at any width; and propose what the host's rounds propose."""
    torch.backends.cuda.matmul.allow_tf32 = False
    target = Alpamayo.from_pretrained("tiny", dtype=torch.float32, device="cuda")
    options = {"temperature": temperature, "num_traj_samples": samples, "seed": 3, "trajectories": False}
    truth, draft = SpeculativeDecoder(target), draft_of(target, kind)
    rounds = {}
    for loop in ("device", "host"):
        decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop))
        for view in views:
            recorder = Recorder()
            found = decoder.generate(view, observer=recorder, **options)
            assert found.token_ids == truth.generate(view, **options).token_ids
            assert found.drafted and not found.draft_failures
            rounds.setdefault(loop, []).append(
                [[trace.proposed for trace in each.samples] for each in recorder.rounds]
            )
    if samples == 1:  # several share rows on the host, and may walk over each other's
        assert rounds["device"] == rounds["host"]


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_the_fused_block_writes_the_text_of_its_row_width(views, kind):
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
    config, options = DecodeConfig(row_width=8), {"seed": 3, "trajectories": False}
    draft = draft_of(target, kind)
    truth, decoder = SpeculativeDecoder(target, None, config), SpeculativeDecoder(target, draft, config)
    assert decoder.draft.has_static_block
    for view in views:
        assert decoder.generate(view, **options).token_ids == truth.generate(view, **options).token_ids
