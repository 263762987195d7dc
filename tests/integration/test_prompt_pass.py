"""The prompt's pass: trimming and padding change nothing; and what it leaves for the parts after it."""

import itertools

import pytest
import torch

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.prompt_pass import LENGTH_MULTIPLE, ROOM, bucket_of
from alpamayo_dflash.decode.verify import Recording, Verifier
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def target():
    return Alpamayo.from_pretrained("tiny")


@pytest.fixture(scope="module")
def windows():
    return [window for window, _ in held_out(3, seed=5)]


@torch.inference_mode()
def read(target, prompt, taps, context_len, *, padding=0, trimmed=True, capacity=4096):
    """Keys, values, taps and logits after a prompt, with rows of padding after it."""
    verifier = Verifier(target, taps=taps, context_len=context_len, prompt_capacity=capacity)
    if padding is None:
        logits = verifier.prefill(prompt).logits_V
    else:
        seen, length = target.see(prompt), len(prompt)
        verifier.cache.begin_prompt(length)
        ids = torch.cat((prompt.input_ids, torch.zeros(padding, dtype=torch.int64)))
        positions = torch.cat((prompt.position_ids, torch.zeros(3, padding, dtype=torch.int64)), dim=1)
        at = target.image_positions(ids, seen)
        if not trimmed:  # as where every layer has features added: the hook then sees all rows
            seen = type(seen)(
                seen.embeds,
                torch.zeros(target.num_layers, *seen.deepstack.shape[1:]).index_copy(
                    0, torch.arange(len(seen.deepstack)), seen.deepstack
                ),
            )
        logits = verifier._read.work(ids, positions, at, seen)
    cache, length = verifier.cache, len(prompt)
    return logits, cache.keys[:, :length], cache.values[:, :length], cache.taps[: cache.context_len]


@pytest.mark.parametrize("taps", [(2, 5), (1, 7)])
@pytest.mark.parametrize("context_len", [16, 300])
def test_padding_and_trimming_change_nothing(target, windows, taps, context_len):
    """The last layer's rows that are not read are left out; rows after the prompt are seen by none of it."""
    prompt = target.prompt(windows[0])
    assert len(prompt) < 300  # so that the longer context is more than there is
    expected = read(target, prompt, taps, context_len, trimmed=False)
    for found in (
        read(target, prompt, taps, context_len, padding=None),
        read(target, prompt, taps, context_len, padding=70),
        read(target, prompt, taps, context_len, padding=70, trimmed=False),
    ):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    filled = expected[3].abs().sum(-1) > 0
    assert filled.tolist() == [False] * (context_len - len(prompt)) + [True] * min(context_len, len(prompt))


@torch.inference_mode()
@pytest.mark.parametrize("recorded", [(2, 5), (1, 7)])
@pytest.mark.parametrize("taps", [(), (5,), (7, 2)])
def test_recording_is_apart_from_taps(target, windows, taps, recorded):
    """Layers and positions of their own, the last layer's rows among them; each as if it were alone."""
    prompt = target.prompt(windows[0])
    sizes = {"context_len": 16, "prompt_capacity": 512}
    both = Verifier(target, taps=taps, recording=Recording(recorded, 5), **sizes)
    alone = Verifier(target, taps=taps, **sizes)
    other = Verifier(target, taps=recorded, context_len=5, prompt_capacity=512)
    logits = [verifier.prefill(prompt).logits_V for verifier in (both, alone, other)]
    for found, wanted in (
        (logits[0], logits[1]),
        (logits[0], logits[2]),
        (both.cache.taps[:16], alone.cache.taps[:16]),
        (both.cache.recorded[:5], other.cache.taps[:5]),
    ):
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert both.cache.recorded[:5].abs().sum(-1).gt(0).all()


def test_buckets_have_room_after_the_prompt():
    for length in range(1, 4097):
        rows = bucket_of(length)
        assert rows % LENGTH_MULTIPLE == 0 and length + ROOM <= rows < length + ROOM + LENGTH_MULTIPLE
    assert bucket_of(3007) == 3072


def test_a_prompt_that_was_not_read_to_its_end_leaves_none_behind(target, windows, monkeypatch):
    verifier = Verifier(target, prompt_capacity=4096)
    prompt = target.prompt(windows[0])
    first = verifier.prefill(prompt)
    seen = target.see(prompt)
    cut = type(seen)(seen.embeds[:-1], seen.deepstack[:, :-1])
    monkeypatch.setattr(verifier, "vision", lambda prompt: cut)
    with pytest.raises(ValueError, match="image tokens"):
        verifier.prefill(prompt)
    with pytest.raises(ValueError, match="not in this cache"):
        verifier.check(first)


@pytest.mark.parametrize("row_width", [None, 8])
@pytest.mark.parametrize("limit", [1, 2, 5, 40])
def test_the_devices_record_is_the_hosts(target, windows, row_width, limit):
    """Where the samples' tokens lie, how many way-points see and where these stand."""
    decoder = SpeculativeDecoder(target, None, DecodeConfig(loop="device", row_width=row_width))
    for window, seed in itertools.product(windows, range(3)):
        prefilled = decoder.prefill(window)
        decoder.generate(prefilled, seed=seed, num_traj_samples=3, max_new_tokens=limit)
        (round_,), samples = decoder.device_rounds.kept.values(), decoder._finished[1].samples
        texts = round_.texts()
        start = len(prefilled.prompt) + prefilled.prompt.rope_delta
        for index, sample in enumerate(samples):
            first, count = int(texts.first_slots[index]), int(texts.counts[index])
            assert list(range(first, first + count)) == sample.path
            assert int(texts.positions[index]) == start + len(sample.tokens)
            closed = sample.tokens[-1] == target.special.traj_future_start
            assert count == len(sample.tokens) - (not closed)


def test_times_are_of_parts_and_of_the_whole(target, windows):
    found = SpeculativeDecoder(target).generate(windows[0]).timings
    assert set(found.parts) == {"preprocess", "vision", "prompt", "decode", "action"}
    assert all(ms > 0 for ms in found.parts.values())
    from_end_to_end = found.preprocess_ms + found.prefill_ms + found.decode_ms + found.action_ms
    assert sum(found.parts.values()) <= from_end_to_end <= found.total_ms
    assert found.parts["vision"] + found.parts["prompt"] <= found.prefill_ms
    assert 0 <= found.overhead < 1


def test_what_did_not_run_took_no_time(target, windows):
    decoder = SpeculativeDecoder(target)
    found = decoder.generate(decoder.prefill(windows[0]), trajectories=False).timings
    assert found.action_ms == 0 and set(found.parts) == {"decode"}
