"""Speculative decoding writes what autoregressive decoding writes: ids, stops, caches, trajectories."""

import dataclasses
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from alpamayo_dflash.decode import round_device
from alpamayo_dflash.decode.config import DecodeConfig, Request, Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.observer import SPANS, Recorder, StageTimer
from alpamayo_dflash.decode.rollouts import teacher_forced
from alpamayo_dflash.decode.sampling import Chooser
from alpamayo_dflash.decode.stops import StopReason
from alpamayo_dflash.draft.config import FULL_CONTEXT
from alpamayo_dflash.evaluate.config import DistributionConfig
from alpamayo_dflash.evaluate.distribution import chi_square, first_tokens, joint_distribution
from tests.helpers.proposers import NotANumber, Oracle, Random, Reduced
from tests.helpers.random_target import random_prompt, random_target

LIMIT = 20
PROMPT_SEEDS = (0, 1, 3, 5)
ENDED = (StopReason.TRAJ_FUTURE_START, StopReason.EOS, StopReason.LIMIT)
OFF = DecodeConfig(sentence_end="off")
LOOPS = pytest.mark.parametrize("loop", ["host", "device"])


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("vlm"), push=1.5, sharpness=4.0)


@pytest.fixture(scope="module")
def period(target):
    return target.tokenizer.encode(".").ids[0]


@pytest.fixture(scope="module")
def prompts(target):
    return [random_prompt(target, seed=seed) for seed in PROMPT_SEEDS]


@pytest.fixture(scope="module")
def truth(target, prompts):
    """The autoregressive loop's results, by prompt, temperature and samples."""
    decoder = SpeculativeDecoder(target)
    return {
        (index, temperature, samples): decoder.generate(
            prompt,
            temperature=temperature,
            num_traj_samples=samples,
            max_new_tokens=LIMIT,
            trajectories=False,
        )
        for index, prompt in enumerate(prompts)
        for temperature in (0.0, 0.6, 1.2)
        for samples in (1, 6)
    }


def draft_of(kind, target, prompt, block_size, texts):
    known = {"texts": texts, "prompt_length": len(prompt)}
    sizes = (target.vocab_size, block_size)
    match kind:
        case "random":
            return Random(*sizes)
        case "oracle":
            return Oracle(*sizes, **known, errors=0.25)
        case "nan":
            return NotANumber(*sizes, share=0.5)
        case "nothing":
            return NotANumber(*sizes)
        case "early end":
            return Oracle(*sizes, **known, errors=0.3, insert=target.special.cot_end)
        case "early stop":
            return Oracle(*sizes, **known, errors=0.3, insert=target.special.traj_future_start)
        case "early eos":
            return Oracle(*sizes, **known, errors=0.3, insert=target.special.eos)
        case "period":
            return Oracle(*sizes, **known, errors=0.3, insert=target.tokenizer.encode(".").ids[0])
    raise AssertionError(kind)


def test_the_fixtures_texts_end_in_every_way(truth, target, period):
    stops = {stop for result in truth.values() for stop in result.stops}
    assert stops == set(ENDED)
    seen = {token for result in truth.values() for text in result.token_ids for token in text}
    assert {period, target.special.cot_end} <= seen
    assert not seen & set(target.traj_ids)
    lengths = {len(text) for result in truth.values() for text in result.token_ids}
    assert 1 in lengths and max(lengths) == LIMIT
    for result in truth.values():
        for text, stop in zip(result.token_ids, result.stops, strict=True):
            ends = [t for t in text if t in (target.special.traj_future_start, target.special.eos)]
            assert ends == ([] if stop is StopReason.LIMIT else text[-1:])
            assert len(text) == LIMIT or stop is not StopReason.LIMIT


@LOOPS
@pytest.mark.parametrize("mode", ["hint", "off"])
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize(
    "kind", ["random", "oracle", "nan", "early end", "early stop", "early eos", "period"]
)
def test_speculative_is_autoregressive(target, prompts, truth, *, kind, block_size, mode, loop):
    for (index, temperature, samples), expected in truth.items():
        draft = draft_of(kind, target, prompts[index], block_size, expected.token_ids)
        decoder = SpeculativeDecoder(target, draft, DecodeConfig(sentence_end=mode, loop=loop))
        got = decoder.generate(
            prompts[index],
            temperature=temperature,
            num_traj_samples=samples,
            max_new_tokens=LIMIT,
            trajectories=False,
        )
        assert got.token_ids == expected.token_ids, (index, temperature, samples)
        assert got.stops == expected.stops
        assert got.coc == expected.coc
        assert got.lossless


@LOOPS
def test_autoregressive_on_either_loop(target, prompts, truth, loop):
    decoder = SpeculativeDecoder(target, None, DecodeConfig(loop=loop))
    for (index, temperature, samples), expected in truth.items():
        got = decoder.generate(
            prompts[index],
            temperature=temperature,
            num_traj_samples=samples,
            max_new_tokens=LIMIT,
            trajectories=False,
        )
        assert got.token_ids == expected.token_ids, (index, temperature, samples)
        assert (got.stops, got.rounds, got.passes) == (expected.stops, expected.rounds, expected.passes)


@LOOPS
@pytest.mark.parametrize("limit", range(1, 12))
def test_the_limit_is_kept_wherever_it_falls(target, prompts, truth, limit, loop):
    expected = truth[1, 0.6, 6]
    draft = draft_of("oracle", target, prompts[1], 8, expected.token_ids)
    got = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop)).generate(
        prompts[1], num_traj_samples=6, max_new_tokens=limit, trajectories=False
    )
    assert got.token_ids == [text[:limit] for text in expected.token_ids]
    for text, whole, stop in zip(got.token_ids, expected.token_ids, got.stops, strict=True):
        assert stop is (
            StopReason.LIMIT if len(text) < len(whole) else expected.stops[expected.token_ids.index(whole)]
        )


def handed_over(monkeypatch, target):
    """Keep what each call of the action expert is given."""
    prefixes = []
    denoise = target.denoise
    monkeypatch.setattr(
        target, "denoise", lambda noise, prefix: prefixes.append(prefix) or denoise(noise, prefix)
    )
    return prefixes


@pytest.fixture(scope="module")
def acted():
    """The autoregressive results with trajectories and what is handed over, as tests come to need them."""
    return {}


@LOOPS
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("kind", ["random", "oracle", "early end"])
def test_caches_and_trajectories_are_equal(
    monkeypatch, target, prompts, truth, acted, *, temperature, samples, kind, loop
):
    prefixes = handed_over(monkeypatch, target)
    options = {"temperature": temperature, "num_traj_samples": samples, "max_new_tokens": LIMIT, "seed": 0}
    for index, prompt in enumerate(prompts):
        texts = truth[index, temperature, samples].token_ids
        if (index, temperature, samples) not in acted:
            result = SpeculativeDecoder(target).generate(prompt, **options)
            acted[index, temperature, samples] = result, prefixes[-1]
        expected, wanted = acted[index, temperature, samples]
        draft = draft_of(kind, target, prompt, 8, texts)
        got = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop)).generate(prompt, **options)
        given = prefixes[-1]
        assert torch.equal(wanted.lengths, given.lengths)
        assert torch.equal(wanted.positions, given.positions)
        for sample, (text, stop) in enumerate(zip(texts, expected.stops, strict=True)):
            whole = stop is StopReason.TRAJ_FUTURE_START
            length = len(prompt) + len(text) - (0 if whole else 1)
            assert int(given.lengths[sample]) == length
            assert int(given.positions[sample]) == len(prompt) + len(text) + prompt.rope_delta
            for a, b in ((wanted.keys, given.keys), (wanted.values, given.values)):
                assert torch.allclose(a[:, sample, :length], b[:, sample, :length], atol=2e-5)
        assert got.pred_xyz.shape == (samples, target.n_waypoints, 3)
        assert torch.allclose(got.pred_xyz, expected.pred_xyz, atol=1e-3)
        assert torch.allclose(got.pred_rot, expected.pred_rot, atol=1e-4)
        assert not got.pred_xyz.is_inference()


def test_the_handed_cache_is_the_teacher_forced_one(monkeypatch, target, prompts, truth):
    """Keys and values of the text alone, in order, as one plain chain gives them."""
    from alpamayo_dflash.decode.cache import ROOT
    from alpamayo_dflash.decode.tree import Tree
    from alpamayo_dflash.decode.verify import Verifier

    prefixes = handed_over(monkeypatch, target)
    expected = truth[1, 0.6, 6]
    draft = draft_of("oracle", target, prompts[1], 8, expected.token_ids)
    SpeculativeDecoder(target, draft).generate(prompts[1], num_traj_samples=6, max_new_tokens=LIMIT)
    verifier = Verifier(target, prompt_capacity=64)
    prefilled = verifier.prefill(prompts[1])
    for sample, text in enumerate(expected.token_ids):
        verifier.begin(prefilled, LIMIT)
        verifier.rows(Tree(verifier.cache.tail).add_chain(text, ROOT))
        length = int(prefixes[0].lengths[sample])
        assert torch.allclose(
            prefixes[0].keys[:, sample, :length], verifier.cache.keys[:, :length], atol=2e-5
        )


def test_a_seed_gives_a_text_whatever_else_is_asked(target, prompts, truth):
    """Sample k of six is what it is among k + 1; another seed or window differs."""
    six = truth[1, 1.2, 6].token_ids
    decoder = SpeculativeDecoder(target)
    options = {"temperature": 1.2, "max_new_tokens": LIMIT, "trajectories": False}
    assert decoder.generate(prompts[1], num_traj_samples=3, **options).token_ids == six[:3]
    assert decoder.generate(prompts[1], num_traj_samples=6, seed=1, **options).token_ids != six
    renamed = dataclasses.replace(prompts[1], key="another")
    assert decoder.generate(renamed, num_traj_samples=6, **options).token_ids != six
    prefilled = decoder.prefill(prompts[1])
    for _ in range(2):
        assert decoder.generate(prefilled, num_traj_samples=6, **options).token_ids == six


def test_texts_that_agree_share_rows(target, prompts, truth):
    texts = truth[0, 0.0, 6].token_ids
    plain, blocks = Recorder(), Recorder()
    options = {"temperature": 0.0, "num_traj_samples": 6, "max_new_tokens": LIMIT, "trajectories": False}
    SpeculativeDecoder(target).generate(prompts[0], observer=plain, **options)
    draft = draft_of("oracle", target, prompts[0], 8, texts)
    SpeculativeDecoder(target, draft, OFF).generate(prompts[0], observer=blocks, **options)
    assert {trace.rows for trace in plain.rounds} == {1}
    assert all(trace.rows <= 9 for trace in blocks.rounds)
    assert all(len(trace.samples) == 6 for trace in blocks.rounds)
    assert {len(call[2]) for call in draft.calls} == {1}


@pytest.mark.parametrize("samples", [1, 6])
def test_rounds_and_counts_add_up(target, prompts, truth, samples):
    for index, prompt in enumerate(prompts):
        expected = truth[index, 0.6, samples]
        draft = draft_of("oracle", target, prompt, 8, expected.token_ids)
        recorder = Recorder()
        got = SpeculativeDecoder(target, draft).generate(
            prompt, num_traj_samples=samples, max_new_tokens=LIMIT, trajectories=False, observer=recorder
        )
        texts = [[token] for token in recorder.first_tokens]
        passes = drafted = 0
        for number, trace in enumerate(recorder.rounds):
            assert trace.index == number
            for part in trace.samples:
                text = texts[part.sample]
                assert part.anchor == text[-1] and part.position == len(text) - 1
                assert part.emitted[: part.accepted] == part.proposed[: part.accepted]
                assert part.drafted <= len(part.proposed)
                text += part.emitted
                passes += 1
                drafted += part.drafted
        assert texts == got.token_ids
        assert got.rounds == len(recorder.rounds)
        assert (got.passes, got.drafted) == (passes, drafted)
        assert got.emitted == sum(len(text) - 1 for text in texts)
        assert got.acceptance_length == (got.emitted / passes if passes else 0)
        assert got.accepted <= got.drafted


@pytest.mark.parametrize("block_size", [2, 8, 16])
def test_a_perfect_draft_needs_few_passes(target, prompts, truth, block_size):
    for index, prompt in enumerate(prompts):
        [text] = truth[index, 0.0, 1].token_ids
        if target.special.cot_end in text:
            continue  # there the grammar of the end adds a row
        draft = Oracle(target.vocab_size, block_size, texts=[text], prompt_length=len(prompt))
        got = SpeculativeDecoder(target, draft, OFF).generate(
            prompt, temperature=0.0, max_new_tokens=LIMIT, trajectories=False
        )
        assert got.rounds == math.ceil((len(text) - 1) / block_size)
        assert got.accepted == got.drafted or got.stops != [StopReason.LIMIT]


def test_autoregressive_decoding_accepts_one_token_a_pass(truth):
    for result in truth.values():
        assert result.acceptance_length in (0.0, 1.0)
        assert result.drafted == result.accepted == result.draft_failures == 0


def test_a_failing_draft_is_counted_and_the_target_goes_on(target, prompts, truth):
    draft = NotANumber(target.vocab_size, 8)
    got = SpeculativeDecoder(target, draft).generate(
        prompts[1], num_traj_samples=6, max_new_tokens=LIMIT, trajectories=False
    )
    assert got.token_ids == truth[1, 0.6, 6].token_ids
    assert got.draft_failures == draft.failures > 0
    assert got.drafted == 0


class Raising(Random):
    """Fails in every other round."""

    error = RuntimeError

    def propose(self, context, context_lengths, anchors):
        proposal = super().propose(context, context_lengths, anchors)
        if len(self.calls) % 2:
            raise self.error("the draft's device is gone")
        return proposal


@LOOPS
@pytest.mark.parametrize("error", [RuntimeError, IndexError, ZeroDivisionError])
def test_a_draft_that_raises_is_dropped_for_the_round_and_counted(target, prompts, truth, loop, error):
    draft = Raising(target.vocab_size, 8)
    draft.error = error
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop))
    with pytest.warns(UserWarning, match="device is gone"):
        got = decoder.generate(prompts[1], max_new_tokens=LIMIT, trajectories=False)
    assert got.token_ids == truth[1, 0.6, 1].token_ids
    assert 0 < got.draft_failures <= got.rounds


@LOOPS
def test_not_finite_logits_are_counted_on_either_loop(target, prompts, truth, loop):
    decoder = SpeculativeDecoder(target, NotANumber(target.vocab_size, 8), DecodeConfig(loop=loop))
    got = decoder.generate(prompts[1], max_new_tokens=LIMIT, trajectories=False)
    assert got.token_ids == truth[1, 0.6, 1].token_ids
    assert got.draft_failures > 0
    assert got.drafted == 0


@LOOPS
def test_a_target_that_is_not_finite_is_an_error(tmp_path, loop):
    target = random_target(tmp_path, push=1.5, sharpness=4.0)
    prompt = random_prompt(target, seed=3)
    decoder = SpeculativeDecoder(target, Random(target.vocab_size, 8), DecodeConfig(loop=loop))
    read = decoder.prefill(prompt)
    with torch.no_grad():
        target.head[7] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite after token 0 of sample 0"):
        decoder.generate(read, max_new_tokens=LIMIT, trajectories=False)
    with pytest.raises(ValueError, match="logits are not finite after the prompt"):
        decoder.generate(prompt, max_new_tokens=LIMIT, trajectories=False)


@LOOPS
@pytest.mark.parametrize("row_width", [None, 8])
def test_a_prompt_that_is_not_finite_leaves_nothing_behind(target, loop, row_width):
    """A shorter prompt's tail lies where the other's entries were; masked, a NaN would be a NaN still."""
    good, bad = random_prompt(target, seed=1, length=20), random_prompt(target, seed=2, length=50)
    bad = dataclasses.replace(bad, pixel_values=bad.pixel_values * float("nan"))
    config, options = DecodeConfig(loop=loop, row_width=row_width), {"trajectories": False}
    expected = SpeculativeDecoder(target, None, config).generate(good, **options).token_ids
    decoder = SpeculativeDecoder(target, Random(target.vocab_size, 8), config)
    read = decoder.prefill(bad)
    with pytest.raises(ValueError, match="not finite after the prompt"):
        decoder.generate(read, **options)
    with pytest.raises(ValueError, match="another was read since"):
        decoder.generate(read, **options)
    assert decoder.generate(good, **options).token_ids == expected


@pytest.mark.parametrize("samples", [1, 6])
def test_choices_that_no_candidate_settles_are_made_again_by_the_host(
    monkeypatch, target, prompts, truth, samples
):
    plain, settles = Chooser.__call__, []

    def forgetful(self, logits, keys, positions):
        choice = plain(self, logits, keys, positions)
        settled = torch.rand(len(logits)) > 0.3
        wrong = torch.where(settled, choice.columns, 11)
        settles.append(bool((~settled).any()))
        return dataclasses.replace(choice, settled=settled, columns=wrong)

    monkeypatch.setattr(Chooser, "__call__", forgetful)
    for index, prompt in enumerate(prompts):
        expected = truth[index, 0.6, samples]
        draft = draft_of("oracle", target, prompt, 8, expected.token_ids)
        got = SpeculativeDecoder(target, draft, DecodeConfig(loop="device")).generate(
            prompt, num_traj_samples=samples, max_new_tokens=LIMIT, trajectories=False
        )
        assert got.token_ids == expected.token_ids
        assert got.stops == expected.stops
    assert sum(settles) > 10


def test_a_draft_that_the_device_cannot_run_runs_on_the_host_and_that_is_said(target, prompts, truth):
    draft = Random(target.vocab_size, 8, context_len=FULL_CONTEXT)
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop="device"))
    with pytest.warns(UserWarning, match="loop on the host: the draft sees every state"):
        got = decoder.generate(prompts[1], max_new_tokens=LIMIT, trajectories=False)
    assert got.token_ids == truth[1, 0.6, 1].token_ids
    assert not decoder.device_rounds.kept


@pytest.mark.parametrize("error", [RuntimeError, IndexError])
def test_a_round_that_cannot_be_captured_runs_all_the_same_and_that_is_said(
    monkeypatch, target, prompts, truth, error
):
    def refuse(call):
        call()
        raise error("not while capturing")

    monkeypatch.setattr(round_device, "CapturedCall", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    make = round_device.DeviceRound.__init__
    monkeypatch.setattr(
        round_device.DeviceRound,
        "__init__",
        lambda *args, graph, **options: make(*args, graph=True, **options),
    )
    decoder = SpeculativeDecoder(target, Random(target.vocab_size, 8), DecodeConfig(loop="device"))
    with pytest.warns(UserWarning, match="could not be captured .*: .*not while capturing"):
        got = decoder.generate(prompts[1], max_new_tokens=LIMIT, trajectories=False)
    assert got.token_ids == truth[1, 0.6, 1].token_ids


def test_rounds_are_kept_for_their_shapes_but_not_without_end(target, prompts):
    decoder = SpeculativeDecoder(target, Random(target.vocab_size, 8), DecodeConfig(loop="device"))
    options = {"max_new_tokens": 3, "trajectories": False}
    decoder.generate(prompts[0], temperature=0.5, **options)
    [kept] = decoder.device_rounds.kept.values()
    for temperature in (0.6, 0.5):
        decoder.generate(prompts[0], temperature=temperature, **options)
    assert list(decoder.device_rounds.kept.values())[-1] is kept
    for step in range(20):
        decoder.generate(prompts[0], temperature=1 + step / 100, **options)
    assert len(decoder.device_rounds.kept) == 8
    assert kept not in decoder.device_rounds.kept.values()


@LOOPS
def test_one_row_width_tells_of_every_first_token(target, prompts, truth, loop):
    recorder = Recorder()
    decoder = SpeculativeDecoder(target, None, DecodeConfig(loop=loop, row_width=4))
    got = decoder.generate(
        prompts[1], num_traj_samples=6, max_new_tokens=LIMIT, trajectories=False, observer=recorder
    )
    assert recorder.first_tokens == tuple(text[0] for text in got.token_ids)
    assert got.token_ids == truth[1, 0.6, 6].token_ids


@pytest.mark.parametrize("limit", range(56, 66))
def test_at_one_row_width_both_loops_lay_their_tails_alike(target, limit):
    request, config = Request(Sampling(), 0, 2, limit), DecodeConfig(loop="device", row_width=8)
    shapes = [
        SpeculativeDecoder(target, draft, config).device_rounds.shape(request)
        for draft in (None, Random(target.vocab_size, 8), Random(target.vocab_size, 16))
    ]
    assert len({(shape.per_sample, shape.slots, shape.pass_rows) for shape in shapes}) == 1


def test_a_reduced_head_maps_to_target_ids(target, prompts, truth):
    expected = truth[1, 0.6, 6]
    used = {token for text in expected.token_ids for token in text}
    left_out = max(used)
    ids = sorted(set(range(0, target.vocab_size, 2)) | used - {left_out}, reverse=True)
    draft = Reduced(target.vocab_size, 8, ids=ids, texts=expected.token_ids, prompt_length=len(prompts[1]))
    got = SpeculativeDecoder(target, draft, OFF).generate(
        prompts[1], num_traj_samples=6, max_new_tokens=LIMIT, trajectories=False
    )
    assert got.token_ids == expected.token_ids
    assert got.acceptance_length > 1.5


def test_draft_and_target_use_the_same_noise(target, prompts):
    """A draft with the target's own logits proposes exactly what the target chooses."""

    class Twin(Random):
        def propose(self, context, context_lengths, anchors):
            block = super().propose(context, context_lengths, anchors)
            for row, (length, anchor) in enumerate(
                zip(context_lengths.tolist(), anchors.tolist(), strict=True)
            ):
                text = [*next(t for t in texts if t[length - len(prompt)] == anchor)]
                text += [1] * (length - len(prompt) + self.block_size - len(text))
                window = teacher_forced(target, prompt, text).logits[length - len(prompt) + 1 :]
                block.logits[row] = window[: self.block_size - 1]
            return block

    prompt = prompts[1]
    # Text of one sample: with its logits, only its noise decides.
    result = SpeculativeDecoder(target).generate(
        prompt, temperature=1.2, seed=8, max_new_tokens=LIMIT, trajectories=False
    )
    texts = result.token_ids
    assert len(texts[0]) > 8
    got = SpeculativeDecoder(target, Twin(target.vocab_size, 8), OFF).generate(
        prompt, temperature=1.2, seed=8, max_new_tokens=LIMIT, trajectories=False
    )
    assert got.token_ids == texts
    assert got.rounds <= math.ceil(len(texts[0]) / 8) + 1


def test_the_draft_sees_states_strictly_before_the_anchor(target, prompts, truth):
    expected = truth[1, 0.6, 6].token_ids
    prompt = prompts[1]
    draft = Oracle(
        target.vocab_size, 8, texts=expected, prompt_length=len(prompt), errors=0.4, context_len=64
    )
    SpeculativeDecoder(target, draft).generate(
        prompt, num_traj_samples=6, max_new_tokens=LIMIT, trajectories=False
    )
    forced = [
        teacher_forced(target, prompt, t, layers=draft.taps, prompt_states=len(prompt)) for t in expected
    ]
    checked = 0
    for contexts, lengths, anchors in draft.calls:
        for context, length, anchor in zip(contexts, lengths.tolist(), anchors.tolist(), strict=True):
            place = length - len(prompt)
            fits = []
            for text, states in zip(expected, forced, strict=True):
                if place < len(text) and text[place] == anchor:
                    both = torch.cat((states.prompt_states, states.states[:, :place]), dim=1)
                    wanted = both.transpose(0, 1).flatten(1)
                    fits.append(torch.allclose(context[64 - length :], wanted, atol=2e-5))
            assert any(fits)
            assert not context[: 64 - length].any()
            checked += 1
    assert checked > 5
    assert draft.bound == (target.embedding.shape, target.head.shape, target.num_layers)


# Sentence ends.


def test_hints_propose_the_end_after_a_period(target, prompts, truth, period):
    end = (target.special.cot_end, target.special.traj_future_start)
    seen = 0
    for index, prompt in enumerate(prompts):
        for mode in ("hint", "off"):
            recorder = Recorder()
            draft = draft_of("period", target, prompt, 8, truth[index, 1.2, 6].token_ids)
            SpeculativeDecoder(target, draft, DecodeConfig(sentence_end=mode)).generate(
                prompt,
                temperature=1.2,
                num_traj_samples=6,
                max_new_tokens=LIMIT,
                trajectories=False,
                observer=recorder,
            )
            for part in (part for trace in recorder.rounds for part in trace.samples):
                chain = (part.anchor, *part.proposed)
                room = LIMIT - part.position - 1
                for place, token in enumerate(chain):
                    if token == period and mode == "hint":
                        assert chain[place + 1 :] == end[: max(0, room - place)]
                        seen += 1
                    if token == end[0]:
                        assert chain[place + 1 :] == end[1:][: max(0, room - place)]
    assert seen > 10


@pytest.mark.parametrize("kind", ["nothing", "oracle", "early end"])
@pytest.mark.parametrize("limit", [LIMIT, 8])
def test_force_ends_the_text_at_a_period(target, prompts, truth, period, *, kind, limit):
    end = [target.special.cot_end, target.special.traj_future_start]
    forced = 0
    for index, prompt in enumerate(prompts):
        expected = truth[index, 1.2, 6]
        draft = draft_of(kind, target, prompt, 8, expected.token_ids)
        decoder = SpeculativeDecoder(target, draft, DecodeConfig(sentence_end="force"))
        got = decoder.generate(prompt, temperature=1.2, num_traj_samples=6, max_new_tokens=limit)
        assert not got.lossless
        for text, own, stop in zip(got.token_ids, expected.token_ids, got.stops, strict=True):
            if stop is StopReason.FORCED:
                at = max(place for place, token in enumerate(text) if token == period)
                assert text == own[: at + 1] + end[: limit - at - 1]
                forced += 1
            else:
                assert text == own[:limit]
            if kind == "nothing" and period in own[: limit - 1]:
                assert stop is StopReason.FORCED  # nothing is proposed, so every token becomes an anchor
                assert text.index(period) == own.index(period)
    assert forced > 0 or kind not in ("nothing", "early end")


def test_a_prompt_that_another_decoder_read_is_refused(target, prompts):
    one, other = SpeculativeDecoder(target), SpeculativeDecoder(target)
    read_by_one = one.prefill(prompts[0])
    other.prefill(prompts[1])
    with pytest.raises(ValueError, match="another decoder read it"):
        other.generate(read_by_one, max_new_tokens=2)


# One row width, bfloat16.


@LOOPS
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bfloat16_loops_agree_at_one_row_width(tmp_path, samples, temperature, loop):
    target = random_target(tmp_path, push=1.2, sharpness=2.0, dtype=torch.bfloat16)
    config = DecodeConfig(row_width=8, loop=loop)
    options = {"temperature": temperature, "num_traj_samples": samples, "max_new_tokens": LIMIT}
    for seed in range(3):
        prompt = random_prompt(target, seed=seed)
        expected = SpeculativeDecoder(target, None, config).generate(prompt, trajectories=False, **options)
        for block_size in (8, 16):  # 16 rows take two passes
            draft = draft_of("oracle", target, prompt, block_size, expected.token_ids)
            got = SpeculativeDecoder(target, draft, config).generate(prompt, trajectories=False, **options)
            assert got.token_ids == expected.token_ids


@LOOPS
def test_one_row_width_gives_the_same_bits(monkeypatch, tmp_path, loop):
    target = random_target(tmp_path, push=1.2, sharpness=2.0, dtype=torch.bfloat16)
    prefixes = handed_over(monkeypatch, target)
    config = DecodeConfig(row_width=8, loop=loop)
    prompt = random_prompt(target, seed=1)
    options = {"temperature": 0.8, "num_traj_samples": 3, "max_new_tokens": LIMIT}
    expected = SpeculativeDecoder(target, None, config).generate(prompt, **options)
    draft = draft_of("oracle", target, prompt, 8, expected.token_ids)
    SpeculativeDecoder(target, draft, config).generate(prompt, **options)
    wanted, given = prefixes
    for sample, length in enumerate(wanted.lengths.tolist()):
        assert torch.equal(wanted.keys[:, sample, :length], given.keys[:, sample, :length])
        assert torch.equal(wanted.values[:, sample, :length], given.values[:, sample, :length])


# The distribution, not only the sequences.


@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("drafted", [False, True])
def test_first_tokens_have_the_targets_joint_distribution(target, prompts, truth, samples, drafted):
    sampling = Sampling(0.7, 0.9)
    # This draft knows a few texts and is right now and then.
    draft = draft_of("oracle", target, prompts[1], 8, truth[1, 0.6, 6].token_ids) if drafted else None
    decoder = SpeculativeDecoder(target, draft)
    prefilled = decoder.prefill(prompts[1])
    joint = joint_distribution(decoder, prefilled, 3, sampling)
    config = DistributionConfig(
        Path("draft"), Path("clips"), "target", seeds=1200 // samples, temperature=0.7, top_p=0.9
    )
    found = first_tokens(decoder, prefilled, config, samples)
    counts = Counter(text for texts in found for text in texts)
    assert sum(counts.values()) == 1200
    test = chi_square(counts, joint)
    assert test.degrees >= 10
    assert test.p_value > 1e-3
    # The test has teeth: another temperature's distribution does not pass.
    other = joint_distribution(decoder, prefilled, 3, Sampling(1.0, 0.9))
    assert chi_square(counts, other).p_value < 1e-3


# Bad input.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_traj_samples": 0}, "num_traj_samples is 0"),
        ({"temperature": -1.0}, "-1.0"),
        ({"top_p": 0.0}, "0.0"),
        ({"top_p": 1.5}, "1.5"),
        ({"action_noise": torch.zeros(1, 3, 2)}, r"\(1, 3, 2\)"),
    ],
)
def test_options_outside_their_range(target, prompts, options, named):
    with pytest.raises(ValueError, match=named):
        SpeculativeDecoder(target).generate(prompts[0], **options)


def test_a_prompt_longer_than_the_cache(target, prompts):
    with pytest.raises(ValueError, match=r"20 tokens.*19"):
        SpeculativeDecoder(target, None, DecodeConfig(prompt_capacity=19)).generate(prompts[0])


@pytest.mark.parametrize("block_size", [1, 65])
def test_a_block_size_that_is_refused(target, block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size}"):
        SpeculativeDecoder(target, Random(target.vocab_size, block_size))


def test_a_draft_whose_logits_do_not_fit(target, prompts):
    draft = Random(target.vocab_size - 1, 8)
    with pytest.raises(ValueError, match=str(target.vocab_size - 1)):
        SpeculativeDecoder(target, draft).generate(prompts[1], max_new_tokens=8)


def test_timings_and_spans(target, prompts):
    timer = StageTimer()
    draft = Random(target.vocab_size, 8)
    result = SpeculativeDecoder(target, draft).generate(prompts[1], max_new_tokens=8, observer=timer)
    times = result.timings
    assert min(times.prefill_ms, times.decode_ms, times.action_ms) > 0
    assert times.total_ms >= times.prefill_ms + times.decode_ms + times.action_ms
    assert all(timer.totals_ms[name] > 0 for name in SPANS if name != "round")
    assert sum(timer.totals_ms.values()) <= times.decode_ms


# The official code's numbers.

GOLDEN = Path(os.environ.get("ALPAMAYO_GOLDEN") or Path(__file__).resolve().parents[3] / "shared" / "golden")
# The folder holds sets, or is one itself.
JSONS = sorted([*GOLDEN.glob("*/cases/*.json"), *GOLDEN.glob("cases/*.json")])
CASES = [path for path in JSONS if not path.stem.endswith("_multi")]
MULTI = [path for path in JSONS if path.stem.endswith("_multi")]


def golden_prompt(name):
    """Load a case, its target and its prompt."""
    from safetensors.torch import load_file

    from alpamayo_dflash.target.alpamayo import Alpamayo
    from alpamayo_dflash.target.prompt import Prompt

    case = load_file(name.with_suffix(".safetensors"))
    single = load_file(name.parent / f"{name.stem.removesuffix('_multi')}.safetensors")
    target = Alpamayo.from_pretrained(name.parents[1] / "checkpoint")
    frames = target.patch_shape.temporal
    values = (single["pixel_u8"].float() - 127.5) / 127.5
    pixels = values.unsqueeze(2).expand(-1, -1, frames, -1, -1).flatten(1)
    prompt = Prompt(
        single["input_ids"][0],
        pixels,
        single["image_grid_thw"],
        single["position_ids"][:, 0],
        int(single["rope_deltas"]),
        name.stem,
        single["ego_history_xyz"][0, 0],
        single["ego_history_rot"][0, 0],
    )
    return target, prompt, case, json.loads(name.read_text())


def through(text, stop):
    """A text through its end mark; whole where it has none."""
    return text[: text.index(stop) + 1] if stop in text else text


@pytest.mark.skipif(not CASES, reason=f"no golden fixtures in {GOLDEN}")
@pytest.mark.parametrize("name", CASES, ids=lambda name: f"{name.parents[1].name}-{name.stem}")
@pytest.mark.parametrize("kind", [None, "random", "oracle"])
def test_golden_case(name, kind):
    target, prompt, case, facts = golden_prompt(name)
    stop = target.special.traj_future_start
    generated = case["generated_ids"][0].tolist()
    text = through(generated, stop)
    draft = None if kind is None else draft_of(kind, target, prompt, 8, [text])
    if draft is not None:
        draft.taps, draft.context_len = (0, 1), 512
    got = SpeculativeDecoder(target, draft).generate(
        prompt, temperature=0.0, max_new_tokens=facts["max_new_tokens"], action_noise=case["noise"]
    )
    assert got.token_ids == [text]
    assert got.coc == [facts["cot"]]
    assert got.stops == [StopReason.TRAJ_FUTURE_START if stop in text else StopReason.LIMIT]
    assert float((got.pred_xyz - case["pred_xyz"][0, 0]).abs().max()) <= 1e-4
    assert float((got.pred_rot - case["pred_rot"][0, 0]).abs().max()) <= 1e-5
    forced = teacher_forced(target, prompt, generated, layers=range(target.num_layers), prompt_states=8)
    assert float((forced.logits - case["gen_logits"]).abs().max()) <= 1e-4
    assert float((forced.states - case["gen_hidden"][1:]).abs().max()) <= 1e-4
    assert float((forced.prompt_states - case["prompt_hidden"][1:, -8:]).abs().max()) <= 1e-4


@pytest.mark.skipif(not MULTI, reason=f"no golden fixtures in {GOLDEN}")
@pytest.mark.parametrize("name", MULTI, ids=lambda name: f"{name.parents[1].name}-{name.stem}")
def test_golden_samples_of_different_lengths(name):
    """Three texts that part on the way, as one tree of rows; the expert reads each one's own part of it."""
    from alpamayo_dflash.decode.cache import ROOT
    from alpamayo_dflash.decode.tree import Tree
    from alpamayo_dflash.decode.verify import Verifier

    target, prompt, case, _ = golden_prompt(name)
    stop = target.special.traj_future_start
    texts = [row[len(prompt) :] for row in case["sequences_raw"].tolist()]
    texts = [through(text, stop) for text in texts]
    verifier = Verifier(target, prompt_capacity=512)
    verifier.begin(verifier.prefill(prompt), 128)
    tree = Tree(verifier.cache.tail)
    paths = [tree.add_chain(text, ROOT) for text in texts]
    assert len(tree.slots) < sum(map(len, texts))
    verifier.rows(tree.slots, logits=False)
    prefix = verifier.cache.prefix(paths, [len(text) for text in texts], prompt.rope_delta)
    assert torch.equal(prefix.positions, case["expert_position_ids"][0, :, 0])
    cached = case["expert_attention_mask"].shape[-1] - target.n_waypoints
    visible = (case["expert_attention_mask"][:, 0, :cached] == 0).sum(-1)
    assert torch.equal(prefix.lengths, visible)
    action = target.denoise(case["noise"], prefix)
    assert float((action - case["action"]).abs().max()) <= 5e-5
