"""The expert and the action space against plain formulas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from alpamayo_dflash.target.alpamayo import Alpamayo, time_grid
from alpamayo_dflash.target.config import ActionSpaceConfig
from alpamayo_dflash.target.expert import ActionPrefix
from alpamayo_dflash.target.motion import ActionSpace, initial_speed, yaw_matrices
from tests.helpers import random_target as factory


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Alpamayo:
    return factory.odd_target(tmp_path_factory.mktemp("expert"))


def make_prefix(target: Alpamayo, lengths: list[int], entries: int, seed: int = 0) -> ActionPrefix:
    generator = torch.Generator().manual_seed(seed)
    shape = (target.num_layers, len(lengths), entries, target.num_kv_heads, target.head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    return ActionPrefix(keys, values, torch.tensor(lengths), torch.tensor(lengths) + 3)


def one(prefix: ActionPrefix, sample: int) -> ActionPrefix:
    """One sample's prefix, cut to what it sees."""
    length = int(prefix.lengths[sample])
    row = slice(sample, sample + 1)
    return ActionPrefix(
        prefix.keys[:, row, :length],
        prefix.values[:, row, :length],
        prefix.lengths[row],
        prefix.positions[row],
    )


def noise(samples: int, seed: int = 1) -> Tensor:
    return torch.randn(samples, factory.WAYPOINTS, 2, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_samples_of_different_lengths_do_not_touch_each_other(target: Alpamayo):
    prefix = make_prefix(target, [9, 4, 7], entries=9)
    x, t = noise(3), torch.tensor([0.0, 0.3, 0.9])
    together = target.velocity(x, t, prefix)
    for sample in range(3):
        row = slice(sample, sample + 1)
        alone = target.velocity(x[row], t[row], one(prefix, sample))
        assert torch.allclose(together[row], alone, atol=1e-5)
    assert not torch.allclose(
        together[1], target.velocity(x, t, make_prefix(target, [9, 5, 7], 9))[1], atol=1e-3
    )


@torch.no_grad()
def test_waypoints_see_each_other_in_both_directions(target: Alpamayo):
    prefix, t = make_prefix(target, [6], entries=6), torch.tensor([0.5])
    x = noise(1)
    base = target.velocity(x, t, prefix)
    for changed, seen in ((0, factory.WAYPOINTS - 1), (factory.WAYPOINTS - 1, 0)):
        other = x.clone()
        other[0, changed] += 1.0
        assert (target.velocity(other, t, prefix)[0, seen] - base[0, seen]).abs().max() > 1e-4


@torch.no_grad()
def test_velocity_equals_transformers_layers(target: Alpamayo):
    """The same layers run by transformers' own forward, prefix and way-points in one masked sequence."""
    from transformers import DynamicCache

    prefix, x, t = make_prefix(target, [6], entries=6), noise(1), torch.tensor([0.4])
    cache = DynamicCache()
    for layer in range(target.num_layers):
        cache.update(prefix.keys[layer].transpose(1, 2), prefix.values[layer].transpose(1, 2), layer)
    hidden = target.action_in_proj(x, t)
    positions = prefix.positions[:, None] + torch.arange(factory.WAYPOINTS)
    rotary = target.rotary(positions.expand(3, -1, -1))
    for layer in target.expert.layers:
        layer.self_attn.config._attn_implementation = "eager"
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, past_key_values=cache)
    expected = target.action_out_proj(target.expert.norm(hidden))
    assert torch.allclose(target.velocity(x, t, prefix), expected, atol=1e-5)


def test_velocity_is_differentiable(target: Alpamayo):
    prefix = make_prefix(target, [5, 3], entries=5)
    target.zero_grad()
    loss = target.velocity(noise(2), torch.tensor([0.1, 0.7]), prefix).square().mean()
    loss.backward()
    parts = (target.expert, target.action_in_proj, target.action_out_proj)
    for name, parameter in [item for part in parts for item in part.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_denoise_is_the_euler_loop(target: Alpamayo):
    prefix, start = make_prefix(target, [5], entries=5), noise(1)
    seen: list[tuple[int, float]] = []
    action = target.denoise(start, prefix, observe=lambda step, t, x, v: seen.append((step, t.item())))
    x = start
    with torch.no_grad():
        for step in range(factory.STEPS):
            x = x + target.velocity(x, torch.tensor([step / factory.STEPS]), prefix) / factory.STEPS
    assert torch.allclose(action, x, atol=1e-5)
    assert [step for step, _ in seen] == list(range(factory.STEPS))
    assert seen[1][1] == pytest.approx(1 / factory.STEPS)
    assert not torch.allclose(action, target.denoise(start, prefix, num_steps=1), atol=1e-4)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_are_checked(steps: int):
    with pytest.raises(ValueError, match=f"num_steps is {steps}"):
        time_grid(steps)


def test_prefix_shapes_are_checked():
    keys = torch.zeros(2, 1, 3, 2, 4)
    with pytest.raises(ValueError, match="must both be"):
        ActionPrefix(keys, keys[:, :, :2], torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ValueError, match="must both be"):
        ActionPrefix(keys, keys, torch.tensor([1, 1]), torch.tensor([1]))


def turning(speed: float, rate: float, times: np.ndarray) -> tuple[Tensor, Tensor]:
    """Poses on a circle at constant speed, at the origin and heading +x at time 0."""
    heading = rate * times
    x, y = speed / rate * np.sin(heading), speed / rate * (1 - np.cos(heading))
    xyz = torch.tensor(np.stack((x, y, np.zeros_like(x)), axis=-1), dtype=torch.float32)
    return xyz, yaw_matrices(torch.tensor(heading, dtype=torch.float32))


def test_initial_speed_of_a_circle():
    history = turning(8.0, 0.2, np.arange(-15, 1) * 0.1)
    assert initial_speed(*history, ActionSpaceConfig()).item() == pytest.approx(8.0, abs=0.01)


def test_straight_braking_has_a_closed_form():
    space = ActionSpace(ActionSpaceConfig())
    times = torch.arange(1, 65) * 0.1
    history = torch.zeros(16, 3)
    history[:, 0] = 12.0 * torch.arange(-15, 1) * 0.1
    action = space.normalise(torch.full((64,), -1.5), torch.zeros(64))
    xyz, rot = space.to_trajectory(action, history, torch.eye(3).expand(16, 3, 3))
    expected = 12.0 * times - 0.75 * times**2
    assert (xyz[:, 0] - expected).abs().max() < 0.02
    assert xyz[:, 1:].abs().max() == 0
    assert torch.allclose(rot, torch.eye(3).expand(64, 3, 3), atol=1e-6)


def test_actions_of_a_circle():
    space = ActionSpace(ActionSpaceConfig())
    history, future = (turning(8.0, 0.2, np.arange(*span) * 0.1) for span in ((-15, 1), (1, 65)))
    action = space.from_trajectory(*future, *history)
    acceleration, curvature = space.denormalise(action)
    assert acceleration[4:-4].abs().max() < 0.05
    assert (curvature[4:-4] - 0.2 / 8.0).abs().max() < 2e-3
    xyz, _ = space.to_trajectory(action, *history)
    assert (xyz - future[0]).norm(dim=-1).max() < 0.3
    assert space.within_bounds(action)
    assert not space.within_bounds(action + torch.tensor([100.0, 0.0]))


def test_a_batch_of_trajectories_is_each_alone():
    space = ActionSpace(ActionSpaceConfig())
    history = turning(6.0, 0.1, np.arange(-15, 1) * 0.1)
    futures = [turning(6.0, rate, np.arange(1, 65) * 0.1) for rate in (0.1, -0.3)]
    stacked = [torch.stack(part) for part in zip(*futures, strict=True)]
    batch_history = [part.expand(2, *part.shape) for part in history]
    together = space.from_trajectory(*stacked, *batch_history)
    for index, future in enumerate(futures):
        assert torch.allclose(together[index], space.from_trajectory(*future, *history), atol=1e-4)
    xyz, rot = space.to_trajectory(together, *history)
    assert xyz.shape == (2, 64, 3)
    assert rot.shape == (2, 64, 3, 3)


def test_yaw_is_unwrapped():
    """A heading that passes ±π turns on smoothly; wrapped, it would look like a spin back."""
    space = ActionSpace(ActionSpaceConfig())
    history = turning(5.0, 0.8, np.arange(-15, 1) * 0.1)
    future = turning(5.0, 0.8, np.arange(1, 65) * 0.1)
    assert math.pi < 0.8 * 6.4 < 2 * math.pi
    _, curvature = space.denormalise(space.from_trajectory(*future, *history))
    assert (curvature[4:-4] - 0.8 / 5.0).abs().max() < 5e-3


def test_trajectory_ignores_autocast(target: Alpamayo):
    window = factory.odd_window()
    history = torch.from_numpy(window.ego_history_xyz), torch.from_numpy(window.ego_history_rot)
    plain, _ = target.trajectory(noise(2), *history)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = target.trajectory(noise(2), *history)
    assert torch.equal(plain, cast)


def test_the_random_target_is_the_same_for_one_seed(tmp_path: Path):
    """So that a failure of these tests can be repeated."""
    first, second = factory.odd_target(tmp_path / "a", seed=3), factory.odd_target(tmp_path / "b", seed=3)
    assert torch.equal(first.head, second.head)
    assert torch.equal(first.action_out_proj.weight, second.action_out_proj.weight)
