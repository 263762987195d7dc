"""Drafts with a head on previous picks decode without changing a word, on the host and on the device."""

from dataclasses import replace

import pytest
import torch

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.observer import Recorder
from alpamayo_dflash.draft.heads import KINDS
from alpamayo_dflash.draft.model import DFlashDraft
from tests.helpers.random_target import random_draft, random_prompt, random_target

LIMIT = 20


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("vlm"), push=1.5, sharpness=4.0)


@pytest.fixture(scope="module")
def prompts(target):
    return [random_prompt(target, seed=seed) for seed in (0, 1, 3)]


def draft_of(target, kind, *, few=None):
    """A random draft whose head has a say; with `few`, of a reduced vocabulary."""
    draft = random_draft(
        target,
        target_layer_ids=(0, target.num_layers - 1),
        draft_vocab_size=few,
        previous_head=kind,
        previous_size=16,
    )
    if few is not None:
        draft.draft_token_ids.copy_(torch.arange(few) * 2)
    with torch.no_grad():
        draft.previous.out.weight.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(1))
    return draft


def proposed(decoder, prompt, **options):
    recorder = Recorder()
    result = decoder.generate(prompt, max_new_tokens=LIMIT, trajectories=False, observer=recorder, **options)
    return result, [[trace.proposed for trace in each.samples] for each in recorder.rounds]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loop", ["host", "device"])
@pytest.mark.parametrize("few", [None, 100])
def test_speculative_is_autoregressive(target, prompts, kind, loop, few):
    draft = draft_of(target, kind, few=few)
    truth, decoder = SpeculativeDecoder(target), SpeculativeDecoder(target, draft, DecodeConfig(loop=loop))
    for prompt in prompts:
        for temperature in (0.0, 0.6, 1.2):
            for samples in (1, 6):
                options = {"temperature": temperature, "num_traj_samples": samples, "seed": 5}
                expected = truth.generate(prompt, max_new_tokens=LIMIT, trajectories=False, **options)
                found, _ = proposed(decoder, prompt, **options)
                assert found.token_ids == expected.token_ids
                assert found.stops == expected.stops
                assert found.drafted and not found.draft_failures


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_both_rounds_propose_the_same_and_the_head_has_a_say(target, prompts, kind, temperature):
    draft = draft_of(target, kind)
    found = [
        proposed(
            SpeculativeDecoder(target, draft, DecodeConfig(loop=loop)), prompts[0], temperature=temperature
        )
        for loop in ("host", "device")
    ]
    assert found[0][1] == found[1][1]
    with torch.no_grad():
        draft.previous.out.weight.zero_()
    plain = DFlashDraft.random(replace(draft.config, previous_head=None), 3).eval()
    none = [
        proposed(
            SpeculativeDecoder(target, each, DecodeConfig(loop="host")), prompts[0], temperature=temperature
        )
        for each in (draft, plain)
    ]
    assert none[0][1] == none[1][1] != found[0][1]


@pytest.mark.parametrize("loop", ["host", "device"])
def test_a_head_that_fails_is_counted_and_the_text_stays(target, prompts, loop):
    draft = draft_of(target, "gru")
    with torch.no_grad():
        draft.previous.state.weight[0] = float("nan")
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop))
    expected = SpeculativeDecoder(target).generate(prompts[0], max_new_tokens=LIMIT, trajectories=False)
    with pytest.warns(UserWarning, match="the draft failed in some rounds"):
        found, _ = proposed(decoder, prompts[0])
    assert found.token_ids == expected.token_ids
    assert found.draft_failures
