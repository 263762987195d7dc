"""Frames to patches by kernels against the plain form, equal to the bit, in Triton's interpreter."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch

from alpamayo_dflash.kernels.taps import cubic_taps, resize_plain
from alpamayo_dflash.target import images_fused
from alpamayo_dflash.target.images import PatchShape, patches, plain_patches, scale_of_levels
from alpamayo_dflash.target.images_fused import DevicePatches
from tests.helpers.pictures import frames

resize = pytest.importorskip("alpamayo_dflash.kernels.resize")
CPU = torch.device("cpu")
SHAPE = PatchShape(4, 2, 2)


@pytest.mark.parametrize(
    ("width", "wanted", "tile"),
    [
        (50, 16, resize.Tile(8, 64, 4)),  # 14 taps
        (96, 8, resize.Tile(4, 16, 4, unroll=4)),  # 49 taps, uneven turns
        (9, 40, resize.Tile(16, 128, 4)),  # 4 or 5
        (7, 3, resize.Tile(2, 8, 4)),  # every column is a tap
        (1, 5, resize.Tile(8, 32, 4)),  # one
    ],
)
def test_across(width, wanted, tile):
    pictures = torch.from_numpy(frames(1, 3, 11, width)[0])
    taps, found = cubic_taps(width, wanted), torch.full((3, 11, wanted, 3), 7, dtype=torch.uint8)
    resize.resize_across(pictures, taps, found, tile)
    assert torch.equal(found, resize_plain(pictures, taps, cubic_taps(11, 11)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "shape", "tile"),
    [
        ((50, 16, 24), SHAPE, resize.Tile(4, 16, 4)),
        ((90, 8, 16), PatchShape(2, 2, 3), resize.Tile(8, 32, 4, unroll=4)),
        ((9, 24, 24), PatchShape(4, 3, 1), resize.Tile(16, 16, 4)),
        ((12, 12, 18), PatchShape(3, 2, 2), resize.Tile(8, 16, 4)),  # the height stays
    ],
)
def test_down_to_patches(sizes, shape, tile, dtype):
    """Tiles that reach over the images' ends, patches whose side is no power of two."""
    height, wanted, width = sizes
    pictures = torch.from_numpy(frames(1, 3, height, width)[0])
    cut = {"patch": shape.patch, "merge": shape.merge, "temporal": shape.temporal}
    taps = cubic_taps(height, wanted)
    resized = resize_plain(pictures, cubic_taps(width, width), taps)
    expected, _ = patches(resized.permute(0, 3, 1, 2), **cut)
    found = torch.full_like(expected, 7.0, dtype=dtype)
    resize.resize_down_to_patches(pictures, taps, scale_of_levels(dtype), found, **cut, tile=tile)
    assert torch.equal(found, expected.to(dtype))


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch):
    """Every program takes the interpreter as long, whatever its size."""
    monkeypatch.setattr(resize, "ACROSS", resize.Tile(64, 128, 4))
    monkeypatch.setattr(resize, "DOWN", resize.Tile(32, 64, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_of_one_size_after_another(dtype):
    """Their buffers are kept while the size stays, and what was made of an earlier window is its own."""
    device_patches, made = DevicePatches(CPU, dtype), []
    calls = [
        (frames(2, 2, 20, 30, seed=1), [0, 1], 16, 24),
        (frames(2, 2, 20, 30, seed=2), [1, 0], 16, 24),
        (frames(1, 3, 16, 24, seed=3), [0], 16, 24),
        (frames(3, 1, 9, 24, seed=4)[::-1], [2, 0, 1], 16, 24),
    ]
    buffers = []
    for given, order, height, width in calls:
        found = device_patches(given, order, height, width, SHAPE)
        assert found.dtype == dtype and not found.requires_grad
        made.append((found, plain_patches(given, order, height, width, SHAPE).to(dtype)))
        assert torch.equal(device_patches.replay(), found)
        buffers.append(device_patches._buffers)
    assert all(torch.equal(found, expected) for found, expected in made)
    assert [one is other for one, other in pairwise(buffers)] == [True, False, False]


def test_the_frames_may_be_written_over_at_once():
    device_patches, given = DevicePatches(CPU, torch.float32), frames(2, 1, 20, 30)
    expected = plain_patches(given, [0, 1], 16, 24, SHAPE)
    found = device_patches(given, [0, 1], 16, 24, SHAPE)
    given[:] = 0
    assert torch.equal(found, expected)


def test_frames_as_readers_leave_them():
    given, device_patches = frames(2, 1, 20, 30), DevicePatches(CPU, torch.float32)
    expected = plain_patches(given, [0, 1], 16, 24, SHAPE)
    read_only = given.copy()
    read_only.flags.writeable = False
    mirrored = np.ascontiguousarray(given[:, :, ::-1])[:, :, ::-1]
    for there in (read_only, mirrored):
        assert torch.equal(device_patches(there, [0, 1], 16, 24, SHAPE), expected)


def test_threads_take_turns():
    device_patches = DevicePatches(CPU, torch.float32)
    given = [frames(1, 2, 20, 30, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda one: device_patches(one, [0], 16, 24, SHAPE), given))
    for one, values in zip(given, found, strict=True):
        assert torch.equal(values, plain_patches(one, [0], 16, 24, SHAPE))


def test_what_is_made_in_inference_mode_serves_outside():
    device_patches, given = DevicePatches(CPU, torch.float32), frames(1, 1, 20, 30)
    with torch.inference_mode():
        first = device_patches(given, [0], 16, 24, SHAPE)
    assert not first.is_inference()
    assert torch.equal(device_patches(given, [0], 16, 24, SHAPE), first)


def test_tables_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(images_fused, "_MOST_TAPS", 2)
    device_patches = DevicePatches(CPU, torch.float32)
    for height in (20, 9, 20):
        given = frames(1, 1, height, 30)
        found = device_patches(given, [0], 16, 24, SHAPE)
        assert torch.equal(found, plain_patches(given, [0], 16, 24, SHAPE))
        assert len(device_patches._taps) == 2


def test_a_target_takes_them_where_they_run(tmp_path, monkeypatch):
    from alpamayo_dflash.target import alpamayo
    from tests.helpers.random_target import odd_target, odd_window

    target, window = odd_target(tmp_path), odd_window((0, 1, 6))
    expected = target.prompt(window)
    monkeypatch.setattr(alpamayo, "why_plain_images", lambda _: None)
    found = target.prompt(window)
    assert target._device_patches is not None
    for name in ("input_ids", "pixel_values", "image_grid_thw", "position_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    other = copy.deepcopy(target)
    assert other._device_patches is not target._device_patches
    assert torch.equal(other.prompt(window).pixel_values, expected.pixel_values)
    other.to(torch.bfloat16)
    assert torch.equal(other.prompt(window).pixel_values, expected.pixel_values.bfloat16())
    assert set(dict(target.named_parameters())) == set(dict(other.named_parameters()))
