"""Frames to patches: the whole numbers of the resize, pinned memory, and what is checked before any copy."""

import dataclasses

import numpy as np
import pytest
import torch

from alpamayo_dflash.kernels.taps import cubic_taps, resize_plain
from alpamayo_dflash.target import images
from alpamayo_dflash.target.images_fused import why_plain_images
from alpamayo_dflash.target.prompt import build_prompt
from tests.helpers import random_target as factory
from tests.helpers.pictures import SIZES, frames, recorded_sizes


def both(pictures_NYXC, height, width):
    """torch's own outcome and that of the plain form in whole numbers."""
    expected = images.resize(pictures_NYXC.permute(0, 3, 1, 2), height, width).permute(0, 2, 3, 1)
    _, old_height, old_width, _ = pictures_NYXC.shape
    return expected, resize_plain(pictures_NYXC, cubic_taps(old_width, width), cubic_taps(old_height, height))


@pytest.mark.parametrize("size", sorted(SIZES | recorded_sizes()), ids=lambda size: "-".join(map(str, size)))
def test_whole_numbers_are_torchs_resize(size):
    pictures = torch.from_numpy(frames(1, 1, *size[:2])[0])
    expected, found = both(pictures, *size[2:])
    assert found.dtype == torch.uint8 and torch.equal(found, expected)


def test_whole_numbers_at_many_small_sizes():
    generator = np.random.default_rng(0)
    for turn in range(300):
        height, width, new_height, new_width = generator.integers(1, 20 if turn % 2 else 200, 4)
        pictures = torch.from_numpy(frames(1, 2, height, width, seed=turn)[0])
        expected, found = both(pictures, new_height, new_width)
        assert torch.equal(found, expected), (height, width, new_height, new_width)


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_even_pictures_stay_even(level):
    pictures = torch.full((1, 90, 110, 3), level, dtype=torch.uint8)
    _, found = both(pictures, 32, 64)
    assert (found == level).all()


def test_overshoot_is_cut_off():
    """Beside an edge the sums leave 0 ... 255; without the cut they would wrap around."""
    pictures = torch.zeros(1, 16, 40, 3, dtype=torch.uint8)
    pictures[:, :, 20:] = 255
    taps = cubic_taps(40, 30)
    sums = sum(pictures[0, 0, taps.first + t, 0].int() * w for t, w in enumerate(taps.weights)) >> taps.bits
    assert sums.min() < 0 and sums.max() > 255
    expected, found = both(pictures, 16, 30)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", [(1920, 576), (1080, 64), (7, 64), (1, 9), (50, 1), (33, 32), (8, 8)])
def test_taps_stay_inside_and_fill_their_bits(sizes):
    taps = cubic_taps(*sizes)
    assert taps.first.min() >= 0 and int(taps.first.max()) + len(taps) <= sizes[0]
    assert 1 << 14 <= int(taps.weights.max()) < 1 << 15 and int(taps.weights.min()) >= -(1 << 15)
    assert (taps.weights.sum(0) - (1 << taps.bits)).abs().max() <= len(taps)


def test_patches_follow_the_order_of_the_prompt():
    shape, given = images.PatchShape(4, 2, 2), frames(3, 2, 20, 30)
    found = images.plain_patches(given, [2, 0, 1], 16, 24, shape)
    expected = images.plain_patches(given[[2, 0, 1]], [0, 1, 2], 16, 24, shape)
    assert torch.equal(found, expected)
    assert not torch.equal(found, images.plain_patches(given, [0, 1, 2], 16, 24, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scale_is_that_of_patches(dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    values, _ = images.patches(levels, patch=16, merge=1, temporal=1)
    assert torch.equal(values.to(dtype).view(3, 256), images.scale_of_levels(dtype).expand(3, 256))


def test_frames_are_staged_however_they_lie():
    given = frames(2, 3, 10, 12)
    staging = images.FrameStaging((2, 3, 10, 12), pinned=False)
    read_only = given.copy()
    read_only.flags.writeable = False
    wide = np.zeros((2, 3, 10, 24, 3), dtype=np.uint8)
    wide[:, :, :, ::2] = given
    ways = {
        "plain": given,
        "read-only": read_only,
        "backwards": np.ascontiguousarray(given[..., ::-1, :])[..., ::-1, :],
        "every second column": wide[:, :, :, ::2],
    }
    for name, frames_there in ways.items():
        out = torch.zeros(2, 3, 10, 12, 3, dtype=torch.uint8)
        staging.frames[:] = 7
        images.upload(frames_there, [1, 0], out, staging)
        assert np.array_equal(out.numpy(), given[::-1]), name
        assert np.array_equal(staging.frames, given[::-1]), name
        assert not images.lie_pinned(frames_there)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_pinned_memory_needs_a_device():
    with pytest.raises(ValueError, match="no CUDA device"):
        images.FrameStaging((1, 1, 8, 8))


def test_a_cpu_takes_the_plain_form():
    assert "cpu, not on a GPU" in why_plain_images(torch.device("cpu"))


@pytest.fixture(scope="module")
def r1(tmp_path_factory):
    return factory.odd_target(tmp_path_factory.mktemp("images"))


def build(target, window, **options):
    return build_prompt(
        window, target.config, target.tokenizer, target.special, target.patch_shape, **options
    )


def test_a_prompt_takes_the_patches_that_it_is_given(r1):
    window, asked = factory.odd_window((0, 1, 6)), []

    def patches_of(*arguments):
        asked.append(arguments)
        return images.plain_patches(*arguments)

    shuffled = dataclasses.replace(window, cameras=(6, 0, 1), frames=window.frames[[2, 0, 1]])
    prompt = build(r1, shuffled, patches_of=patches_of)
    [(given, order, height, width, shape)] = asked
    assert given is shuffled.frames and order == [1, 2, 0] and shape == r1.patch_shape
    grid = [1, height // shape.patch, width // shape.patch]
    assert prompt.image_grid_thw.tolist() == [grid] * (3 * window.frames.shape[1])
    assert torch.equal(prompt.pixel_values, build(r1, window).pixel_values)


def test_no_frame_is_read_of_a_window_that_does_not_fit(r1):
    window = factory.odd_window()
    cut = {"ego_history_xyz": window.ego_history_xyz[1:], "ego_history_rot": window.ego_history_rot[1:]}
    flat = np.zeros((3, 1, 1, 300, 3), dtype=np.uint8)
    bad = {
        "placeholders": (cut, {}),
        "must be": ({"ego_history_rot": window.ego_history_rot[1:]}, {}),
        "frames are float64": ({"frames": window.frames.astype(np.float64)}, {}),
        "2 cameras": ({"cameras": (0, 1)}, {}),
        "aspect ratio": ({"frames": flat}, {}),
        "belong to Alpamayo 1.5": ({}, {"route": "left"}),
        "control token": ({}, {"question": "<|cot_start|>"}),
    }

    def patches_of(*_):
        raise AssertionError("frames were read")

    for message, (changes, options) in bad.items():
        with pytest.raises(ValueError, match=message):
            build(r1, dataclasses.replace(window, **changes), patches_of=patches_of, **options)
