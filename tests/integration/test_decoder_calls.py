"""One decoder and its callers: threads, calls from inside calls, the caller's torch settings, bad values."""

import contextlib
import dataclasses
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from alpamayo_dflash import Alpamayo, DecodeConfig, Observer, SpeculativeDecoder
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.decode.cache import Cache, Tail
from alpamayo_dflash.decode.noise import TokenNoise, token_noise
from alpamayo_dflash.decode.rollouts import Rollouts
from alpamayo_dflash.evaluate.arms import acceptance_of
from tests.helpers.proposers import NotANumber, Random
from tests.helpers.random_target import random_draft, random_prompt, random_target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("vlm"), push=1.5)


@pytest.fixture(scope="module")
def tiny():
    return Alpamayo.from_pretrained("tiny")


def straight(**changes):
    """A window of dark images and a straight drive at 8 m/s."""
    xyz = np.zeros((16, 3), dtype=np.float32)
    xyz[:, 0] = np.arange(-15, 1) * 0.8
    rot = np.tile(np.eye(3, dtype=np.float32), (16, 1, 1))
    frames = np.zeros((4, 4, 64, 128, 3), dtype=np.uint8)
    return dataclasses.replace(Window("clip", 5_100_000, (0, 1, 2, 6), frames, xyz, rot), **changes)


def texts(decoder, prompts, **options):
    return [decoder.generate(prompt, seed=1, max_new_tokens=24, **options).token_ids for prompt in prompts]


def at_once(*jobs):
    """Run the jobs in a thread each; their answers, or what they raised."""
    answers = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(index, job):
        start.wait()
        try:
            answers[index] = job()
        except Exception as error:
            answers[index] = error

    threads = [threading.Thread(target=work, args=item) for item in enumerate(jobs)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that they meet inside of calls
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    return answers


@pytest.mark.parametrize("block", [None, 4])
def test_one_decoder_in_three_threads(target, block):
    prompts = [random_prompt(target, seed=seed) for seed in range(4)]
    draft = None if block is None else Random(target.vocab_size, block)
    right = texts(SpeculativeDecoder(target), prompts, num_traj_samples=2)
    decoder = SpeculativeDecoder(target, draft)

    def job(first):
        order = [*range(first, 4), *range(first)]
        found = texts(decoder, [prompts[i] for i in order], num_traj_samples=2)
        return [found[order.index(i)] for i in range(4)]

    assert at_once(*(lambda first=first: job(first) for first in range(3))) == [right] * 3


def test_three_decoders_over_one_target_and_one_draft(target):
    prompts = [random_prompt(target, seed=seed) for seed in range(3)]
    draft = Random(target.vocab_size, 4)
    right = texts(SpeculativeDecoder(target), prompts)
    decoders = [SpeculativeDecoder(target, draft) for _ in range(3)]
    assert at_once(*(lambda each=each: texts(each, prompts) for each in decoders)) == [right] * 3


def test_a_prompt_that_another_thread_replaced_is_refused(target):
    one, other = random_prompt(target, seed=0), random_prompt(target, seed=1)
    decoder = SpeculativeDecoder(target)
    read = decoder.prefill(one)
    at_once(lambda: decoder.prefill(other))
    with pytest.raises(ValueError, match="another was read since"):
        decoder.generate(read)


def test_a_handover_is_the_same_threads(target):
    prompts = [random_prompt(target, seed=seed) for seed in range(2)]
    decoder = SpeculativeDecoder(target)
    decoder.generate(prompts[0], max_new_tokens=4, trajectories=False)
    assert decoder.handover().sequences.shape[0] == 1
    at_once(lambda: decoder.generate(prompts[1], max_new_tokens=4, trajectories=False))
    with pytest.raises(ValueError, match="another thread's"):
        decoder.handover()


def test_a_call_from_inside_a_call_is_an_error(target):
    prompt = random_prompt(target, seed=0)
    decoder = SpeculativeDecoder(target)
    calls = [lambda: decoder.generate(prompt), lambda: decoder.prefill(prompt), decoder.handover]

    class Calls(Observer):
        def on_prefill(self, prompt_tokens, first_tokens):
            for call in calls:
                with pytest.raises(RuntimeError, match="called from inside it"):
                    call()

    right = SpeculativeDecoder(target).generate(prompt).token_ids
    assert decoder.generate(prompt, observer=Calls()).token_ids == right
    assert decoder.generate(prompt).token_ids == right  # and the turn has been given back


def test_an_error_gives_the_turn_back(target):
    prompt = random_prompt(target, seed=0)
    decoder = SpeculativeDecoder(target)
    with pytest.raises(ValueError, match="action_noise"):
        decoder.generate(prompt, action_noise=torch.zeros(3, 1, 2))
    assert decoder.generate(prompt).token_ids


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("loop", ["host", "device"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_torch_settings_do_not_reach_the_maths(tiny, setting, loop):
    draft = random_draft(tiny)

    def decoded():
        decoder = SpeculativeDecoder(tiny, draft, DecodeConfig(loop=loop))
        result = decoder.generate(straight(), seed=3, num_traj_samples=2, max_new_tokens=12)
        return result.token_ids, result.pred_xyz

    right, path = decoded()
    with SETTINGS[setting]():
        found, xyz = decoded()
    assert found == right
    assert xyz.dtype == torch.float32
    assert torch.equal(xyz, path)


@pytest.mark.parametrize("setting", ["float64 by default", "another device by default"])
def test_a_target_is_loaded_the_same_under_the_callers_settings(tiny, setting):
    with SETTINGS[setting]():
        again = Alpamayo.from_pretrained("tiny")
    state = tiny.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.dtype == state[name].dtype, name
    buffers = dict(tiny.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in again.named_buffers())


def damaged(values, index, value):
    values = values.copy()
    values[index] = value
    return values


XYZ, ROT = straight().ego_history_xyz, straight().ego_history_rot
TURN = np.array([[np.cos(0.01), -np.sin(0.01), 0], [np.sin(0.01), np.cos(0.01), 0], [0, 0, 1]], np.float32)
HISTORIES = {
    r"ego_history_xyz\[3\] is \[nan": {"ego_history_xyz": damaged(XYZ, (3, 0), np.nan)},
    r"ego_history_xyz\[15\] is .*inf": {"ego_history_xyz": damaged(XYZ, (15, 2), np.inf)},
    r"ego_history_rot\[0\] is .*nan": {"ego_history_rot": damaged(ROT, (0, 1, 1), np.nan)},
    "last point is .*it must be the origin": {"ego_history_xyz": XYZ + np.float32([500, 300, 20])},
    r"last point is \[-12": {"ego_history_xyz": XYZ[::-1].copy(), "ego_history_rot": ROT[::-1].copy()},
    r"last point is \[0.0, 0.0, 0.0\] m, turned": {"ego_history_rot": ROT @ TURN},
    r"must be \[M, 3\]": {"ego_history_rot": ROT[:5]},
}


@pytest.mark.parametrize("message", HISTORIES)
def test_a_history_that_is_none_is_refused(tiny, message):
    window = straight(**HISTORIES[message])
    with pytest.raises(ValueError, match=f"window clip@5100000: (ego history|{message}|.*{message})"):
        tiny.prompt(window)
    prompt = dataclasses.replace(
        tiny.prompt(straight()),
        ego_history_xyz=torch.from_numpy(window.ego_history_xyz),
        ego_history_rot=torch.from_numpy(window.ego_history_rot),
    )
    with pytest.raises(ValueError, match=message):  # a prompt that was made by hand
        SpeculativeDecoder(tiny).generate(prompt)
    with pytest.raises(ValueError, match=message):
        Rollouts(tiny, taps=(), context_len=0, max_tokens=4).read(window)


def test_reversing_and_standing_are_histories(tiny):
    backwards = straight(ego_history_xyz=XYZ * np.float32([-1, 1, 1]))
    standing = straight(ego_history_xyz=np.zeros_like(XYZ))
    nearly = straight(ego_history_xyz=XYZ + np.float32(0.005))
    for window in (backwards, standing, nearly):
        assert len(tiny.prompt(window)) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_noise_that_is_not_finite_is_refused_before_work(tiny, value):
    noise = torch.zeros(1, tiny.n_waypoints, 2)
    noise[0, 5, 1] = value
    with pytest.raises(ValueError, match="action_noise of sample 0 is not finite"):
        SpeculativeDecoder(tiny).generate(straight(), action_noise=noise)


def test_an_expert_that_is_not_finite_gives_no_trajectory():
    target = Alpamayo.from_pretrained("tiny")
    with torch.no_grad():
        target.action_out_proj.bias[0] = float("nan")
    decoder = SpeculativeDecoder(target)
    with pytest.raises(ValueError, match="trajectory is not finite"):
        decoder.generate(straight())
    assert decoder.generate(straight(), trajectories=False).coc


def test_draft_failures_are_counted_and_said(target):
    prompt = random_prompt(target, seed=0)
    draft = NotANumber(target.vocab_size, 4)
    decoder = SpeculativeDecoder(target, draft)
    with pytest.warns(UserWarning, match="the draft failed in some rounds"):
        result = decoder.generate(prompt, seed=1, max_new_tokens=12)
    assert result.draft_failures == draft.failures > 0
    assert acceptance_of(result)["draft_failures"] == draft.failures
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sound = SpeculativeDecoder(target, Random(target.vocab_size, 4)).generate(prompt, max_new_tokens=12)
    assert acceptance_of(sound)["draft_failures"] == 0


def test_a_long_limit_takes_memory_in_proportion(target):
    prompt = random_prompt(target, seed=0)
    decoder = SpeculativeDecoder(target)
    right = decoder.generate(prompt, seed=1, max_new_tokens=64, num_traj_samples=6).token_ids
    found = decoder.generate(prompt, seed=1, max_new_tokens=32_768, num_traj_samples=6).token_ids
    assert [text[:64] for text in found] == right
    tail = Tail(10**12)
    assert tail.add(5) == 0
    assert tail.visible([0], 1).shape == (1, 1)


def test_a_cache_that_does_not_fit_is_refused_before_work(target):
    prompt = random_prompt(target, seed=0)
    decoder = SpeculativeDecoder(target)
    right = decoder.generate(prompt, seed=1).token_ids
    with pytest.raises(ValueError, match=r"takes [0-9.]+ GiB, and [0-9.]+ GiB are free on cpu"):
        decoder.generate(prompt, max_new_tokens=10**9)
    assert decoder.generate(prompt, seed=1).token_ids == right
    with pytest.raises(ValueError, match="ask for a smaller prompt_capacity"):
        Cache(target, prompt_capacity=10**10, num_taps=0, context_len=0)


def test_noise_is_kept_in_part_and_the_same(monkeypatch):
    monkeypatch.setattr("alpamayo_dflash.decode.noise._KEPT_VALUES", 2 * 16 * 2 * 20)
    noise = TokenNoise(7, "clip@1", range(2), 20)
    whole = token_noise(7, "clip@1", range(2), range(200), 20)
    for positions in ([0, 1], [15, 16, 40], [199, 3], [100, 120, 140, 160]):
        samples = [position % 2 for position in positions]
        expected = torch.stack([whole[p, s] for p, s in zip(positions, samples, strict=True)])
        assert torch.equal(noise.rows(samples, positions), expected)
    assert len(noise._chunks) <= 4
