"""The fast expert and its kernels against their plain forms, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from alpamayo_dflash.decode.cache import Cache
from alpamayo_dflash.target.expert_fused import (
    BUCKETS,
    ExpertStart,
    FusedExpert,
    SampleTexts,
    misfit_projections,
)
from alpamayo_dflash.target.weights import share_groups

waypoints = pytest.importorskip("alpamayo_dflash.kernels.waypoints")
flow = pytest.importorskip("alpamayo_dflash.kernels.flow")


# A random expert amplifies rounding over its steps.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_attention(q_RHD, cached, own, length, texts):
    """Every sample alone, its keys in a row."""
    count = len(q_RHD) // len(texts)
    outs = []
    for sample, text in enumerate(texts):
        rows = slice(sample * count, (sample + 1) * count)
        at = [*range(length), *(length + slot for slot in text)]
        keys, values = (torch.cat((c[at], o[rows])) for c, o in zip(cached, own, strict=True))
        out = functional.scaled_dot_product_attention(
            *(each.transpose(0, 1) for each in (q_RHD[rows], keys, values)), enable_gqa=True
        )
        outs.append(out.transpose(0, 1).flatten(1))
    return torch.cat(outs)


@pytest.mark.parametrize("plan", [(16, 16, 3, True), (16, 32, 2, False), (64, 16, 1, False)])
@pytest.mark.parametrize("length", [0, 16, 75])
def test_way_points_see_the_prompt_their_text_and_each_other(plan, length):
    heads, kv_heads, dim, count, slots = 6, 2, 16, 10, 40
    texts = [[3, 1, 30], [], list(range(5, 25))]
    q = normal(3 * count, heads, dim)
    cached = normal(length + slots, kv_heads, dim, seed=1), normal(length + slots, kv_heads, dim, seed=2)
    own = normal(3 * count, kv_heads, dim, seed=3), normal(3 * count, kv_heads, dim, seed=4)
    table = torch.full((3, slots), 1 << 20, dtype=torch.int32)  # what is behind a text is not read
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.int32)
    got = waypoints.attend_waypoints(
        q,
        cached,
        own,
        torch.tensor([length]),
        torch.tensor([len(text) for text in texts], dtype=torch.int32),
        table,
        waypoints.WaypointPlan(*plan[:3], 4, 2, apart=plan[3]),
    )
    torch.testing.assert_close(got, plain_attention(q, cached, own, length, texts), rtol=1e-4, atol=1e-5)


def test_plans_hold_at_every_size():
    for samples in BUCKETS:
        plan = waypoints.plan_of(128 * samples)
        assert 128 % plan.rows == 0 and plan.stretches >= 1
    assert waypoints.plan_of(10**6) == waypoints.PLANS[max(waypoints.PLANS)]


@pytest.mark.parametrize("parts", [1, 3])
def test_the_projections_norms(parts):
    x, bias, weight, shift = normal(parts, 5, 40), *(normal(40, seed=seed) for seed in (1, 2, 3))
    whole = functional.silu(x.sum(0) + bias)
    expected = functional.rms_norm(whole, (40,), weight, 1e-5)
    torch.testing.assert_close(flow.silu_norm(x, bias, weight, 1e-5), expected)
    torch.testing.assert_close(
        flow.silu_norm(x, None, weight, 1e-5),
        functional.rms_norm(functional.silu(x.sum(0)), (40,), weight, 1e-5),
    )
    expected = functional.layer_norm(x.sum(0) + bias, (40,), weight, shift, 1e-5)
    torch.testing.assert_close(flow.layer_norm(x, bias, weight, shift, 1e-5), expected)


def test_an_euler_step():
    x, normed, weight, bias = normal(6, 2), normal(6, 48, seed=1), normal(2, 48, seed=2), normal(2, seed=3)
    expected = x + 0.1 * (normed @ weight.T + bias)
    flow.euler_step(x, normed, weight, bias, 0.1)
    torch.testing.assert_close(x, expected)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Two layers, five way-points and two steps, so that little is interpreted."""
    from tests.helpers.random_target import odd_target

    target = odd_target(tmp_path_factory.mktemp("expert"), layers=2)
    space = replace(target.config.action_space, n_waypoints=5)
    target.config = replace(target.config, num_inference_steps=2, action_space=space)
    return target.requires_grad_(False)


@pytest.fixture(scope="module")
def wide_target(tmp_path_factory):
    """As many way-points as R1 has, two layers and one step."""
    from tests.helpers.random_target import random_target

    target = random_target(tmp_path_factory.mktemp("wide"), layers=2)
    target.config = replace(target.config, num_inference_steps=1)
    return target.requires_grad_(False)


@pytest.fixture(autouse=True)
def _small_plans(monkeypatch):
    """Prompts are short here, and every empty stretch is a program to interpret."""
    monkeypatch.setattr(waypoints, "PLANS", {2048: waypoints.WaypointPlan(16, 32, 2, 4, 2)})


def filled(target, length, slots=64):
    cache = Cache(target, prompt_capacity=80, num_taps=0, context_len=0)
    cache.grow(slots)
    cache.keys.copy_(normal(*cache.keys.shape, seed=length))
    cache.values.copy_(normal(*cache.values.shape, seed=length + 1))
    cache.begin_prompt(length)
    return cache


def history():
    steps = torch.arange(-15.0, 1.0)
    xyz = torch.stack((steps * 0.5, 0.01 * steps, 0.1 * steps + 2), dim=-1)
    return xyz, torch.eye(3).repeat(16, 1, 1)


def plain(target, cache, noise, paths, offsets, *, delta=0):
    prefix = cache.prefix(paths, offsets, delta)
    action = target.denoise(noise, prefix)
    return action, *target.trajectory(action, *history())


@pytest.mark.parametrize(("samples", "together"), [(1, False), (1, True), (3, True)])
def test_the_fast_expert_is_the_plain_one(wide_target, monkeypatch, samples, together):
    """One step, with weights as another's model has them or together as our loader lays them."""
    target = wide_target
    monkeypatch.setattr(waypoints, "PLANS", {2048: waypoints.WaypointPlan(128, 32, 2, 4, 2)})
    if together:
        share_groups(target.expert.layers)
    cache = filled(target, 45)
    fast = FusedExpert(target, cache)
    paths = [[0, 9, 4], list(range(40, 55)), [2, 9, 4]][:samples]
    offsets = [len(path) + 1 for path in paths]
    noise = normal(samples, target.n_waypoints, 2)
    texts = SampleTexts(paths, [45 - 7 + offset for offset in offsets])
    got = fast(fast.start(noise, *history()), texts)
    for found, expected in zip(got, plain(target, cache, noise, paths, offsets, delta=-7), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert list(fast.kept) == [samples]


def test_one_batch_serves_any_prompt_and_number_of_samples(target):
    cache = filled(target, 45)
    fast = FusedExpert(target, cache)
    for length, samples, seed in ((45, 2, 0), (7, 1, 1), (80, 2, 2)):
        cache.begin_prompt(length)
        paths = [list(range(sample * 9, sample * 10 + 2 * seed)) for sample in range(samples)]
        noise, offsets = normal(samples, target.n_waypoints, 2, seed=seed), [len(path) for path in paths]
        texts = SampleTexts(paths, [length + offset for offset in offsets])
        fast.kept = {2: fast.kept[2]} if fast.kept else {}
        batch = fast._batch(2)
        got = batch.run(ExpertStart(noise, torch.tensor([5.0, 2.0])), texts)[0]
        torch.testing.assert_close(got, plain(target, cache, noise, paths, offsets)[0], **CLOSE)


def test_more_samples_than_a_batch_holds_take_turns(target, monkeypatch):
    monkeypatch.setattr("alpamayo_dflash.target.expert_fused.BUCKETS", (1, 2))
    cache = filled(target, 10)
    fast = FusedExpert(target, cache)
    noise, paths = normal(3, target.n_waypoints, 2), [[1], [2], [3]]
    got = fast(fast.start(noise, *history()), SampleTexts(paths, [11] * 3))
    for found, expected in zip(got, plain(target, cache, noise, paths, [1] * 3), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    assert sorted(fast.kept) == [1, 2]


def test_what_went_wrong_stays_with_its_window(target):
    cache = filled(target, 10)
    fast = FusedExpert(target, cache)
    noise, texts = normal(2, target.n_waypoints, 2), SampleTexts([[1], [2]], [11] * 2)
    good = fast(fast.start(noise, *history()), texts)
    bad = noise.clone()
    bad[1, 3] = float("nan")
    action, xyz, _ = fast(fast.start(bad, *history()), texts)
    assert action[0].isfinite().all() and torch.equal(action[0], good[0][0])
    assert not xyz[1].isfinite().all()
    for found, expected in zip(fast(fast.start(noise, *history()), texts), good, strict=True):
        assert torch.equal(found, expected)


def test_projections_that_are_more_than_their_weights(target):
    assert misfit_projections(target) is None
    handle = target.action_in_proj.encoder.trunk[3].register_forward_hook(lambda *_: None)
    assert misfit_projections(target) == "action_in_proj.encoder.trunk.3 is a Linear with hooks"
    handle.remove()


def test_the_decoder_takes_the_fast_expert_where_it_runs(wide_target, monkeypatch):
    from alpamayo_dflash.decode import trajectory
    from alpamayo_dflash.decode.decoder import SpeculativeDecoder
    from tests.helpers.random_target import random_prompt

    target, options = wide_target, {"num_traj_samples": 2, "max_new_tokens": 5, "seed": 3}
    monkeypatch.setattr(waypoints, "PLANS", {2048: waypoints.WaypointPlan(128, 32, 2, 4, 2)})
    prompt = random_prompt(target, seed=1)
    expected = SpeculativeDecoder(target).generate(prompt, **options)
    monkeypatch.setattr(trajectory, "why_plain_expert", lambda _: None)
    decoder = SpeculativeDecoder(target)
    cache, start = decoder.verifier.cache, trajectory.Trajectories.start

    def started(self, *given):
        """The texts that follow need more room."""
        found = start(self, *given)
        cache.grow(cache.slots + 1)
        return found

    got = decoder.generate(prompt, **options)
    with monkeypatch.context() as patch:
        patch.setattr(trajectory.Trajectories, "start", started)
        again = decoder.generate(prompt, **options)
    assert got.token_ids == expected.token_ids
    for result in (got, again):
        torch.testing.assert_close(result.pred_xyz, expected.pred_xyz, **CLOSE)
        torch.testing.assert_close(result.pred_rot, expected.pred_rot, **CLOSE)
    generation, expert = decoder._trajectories._fused
    assert list(expert.kept) == [2] and generation == cache.generation
