"""Frames to patches on a CUDA device, equal to the bit to the CPU (run by hand: `pytest -m gpu`)."""

import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from alpamayo_dflash.kernels.taps import cubic_taps, resize_plain
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.images import FrameStaging, PatchShape, lie_pinned, plain_patches
from alpamayo_dflash.target.images_fused import DevicePatches, why_plain_images
from tests.helpers.pictures import SIZES, frames, recorded_sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
SHAPE = PatchShape(16, 2, 2)
# Where torch resizes on the CPU of another kind, these show whether it or the kernels differ.
ALL_SIZES = sorted(SIZES | recorded_sizes() | {(1080, 1920, 2176, 3840), (2160, 3840, 320, 576)})


def equal(found, frames_there, order, size, shape=SHAPE):
    expected = plain_patches(frames_there, order, *size, shape)
    assert found.is_cuda and torch.equal(found.cpu(), expected.to(found.dtype))


@pytest.fixture(scope="module")
def by_dtype():
    return {dtype: DevicePatches(CUDA, dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ALL_SIZES, ids=lambda size: "-".join(map(str, size)))
def test_every_size(by_dtype, size, dtype):
    """One object for all sizes, so that its buffers and tables change under way."""
    given = frames(2, 1, *size[:2])
    found = by_dtype[dtype](given, [0, 1], *size[2:], SHAPE)
    equal(found, given, [0, 1], size[2:])


@pytest.mark.parametrize("size", sorted(SIZES), ids=lambda size: "-".join(map(str, size)))
def test_the_whole_numbers_are_torchs_here_too(size):
    pictures = torch.from_numpy(frames(1, 1, *size[:2])[0])
    found = resize_plain(pictures, cubic_taps(size[1], size[3]), cubic_taps(size[0], size[2]))
    expected = torch.nn.functional.interpolate(
        pictures.permute(0, 3, 1, 2), size=size[2:], mode="bicubic", antialias=True
    )
    assert torch.equal(found.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("shape", [PatchShape(14, 2, 2), PatchShape(8, 4, 1), PatchShape(4, 1, 3)])
def test_other_cuts(shape):
    side = shape.patch * shape.merge
    given, size = frames(1, 3, 123, 211), (3 * side, 5 * side)
    equal(DevicePatches(CUDA, torch.bfloat16)(given, [0], *size, shape), given, [0], size, shape)


@pytest.fixture(scope="module")
def window_frames():
    """A window of R1's size and what the CPU makes of it, cameras out of order."""
    given, order, size = frames(4, 4, 1080, 1920), [2, 0, 3, 1], (320, 576)
    return given, order, size, plain_patches(given, order, *size, SHAPE).bfloat16()


@pytest.mark.parametrize("way", ["pageable", "read-only", "strided", "pinned", "pinned, cameras reversed"])
def test_frames_wherever_they_lie(by_dtype, window_frames, way):
    given, order, size, expected = window_frames
    if way == "read-only":
        given = given.copy()
        given.flags.writeable = False
    elif way == "strided":
        given = np.ascontiguousarray(given[:, :, ::-1])[:, :, ::-1]
    elif way.startswith("pinned"):
        staging = FrameStaging(given.shape[:4])
        backwards = slice(None, None, -1) if way.endswith("reversed") else slice(None)
        staging.frames[:] = given[backwards]
        given = staging.frames[backwards]
    assert lie_pinned(given) == way.startswith("pinned")
    found = by_dtype[torch.bfloat16](given, order, *size, SHAPE)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("pinned", [False, True])
def test_frames_may_be_written_over_once_the_call_returns(by_dtype, window_frames, pinned):
    """The device is kept busy, so that an early return would be seen."""
    given, order, size, expected = window_frames
    negative = 255 - given
    both = expected, plain_patches(negative, order, *size, SHAPE).bfloat16()
    there = FrameStaging(given.shape[:4]).frames if pinned else np.empty_like(given)
    made = []
    for turn in range(4):
        there[:] = (given, negative)[turn % 2]
        torch.cuda._sleep(20_000_000)
        made.append(by_dtype[torch.bfloat16](there, order, *size, SHAPE))
        there[:] = 13
    assert all(torch.equal(found.cpu(), both[turn % 2]) for turn, found in enumerate(made))


def small_windows(count):
    """Frames whose patches take long enough on the device to overlap, and those patches."""
    given = [frames(2, 2, 540, 960, seed=seed) for seed in range(count)]
    return given, [plain_patches(one, [1, 0], 320, 576, SHAPE) for one in given]


def test_a_buffer_in_use_is_waited_for_on_other_streams():
    device_patches = DevicePatches(CUDA, torch.float32)
    given, expected = small_windows(6)
    streams, made = [torch.cuda.Stream() for _ in range(3)], []
    for turn, one in enumerate(given):
        with torch.cuda.stream(streams[turn % 3]):
            if turn % 3 == 0:
                torch.cuda._sleep(20_000_000)
            made.append(device_patches(one, [1, 0], 320, 576, SHAPE))
            # Another size in between: the buffers are freed while kernels on them may be waiting.
            if turn == 3:
                device_patches(one[:1], [0], 320, 576, SHAPE)
    torch.cuda.synchronize()
    assert all(torch.equal(found.cpu(), values) for found, values in zip(made, expected, strict=True))


def test_threads_take_turns():
    device_patches = DevicePatches(CUDA, torch.float32)
    given, expected = small_windows(4)

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = device_patches(given[index % 4], [1, 0], 320, 576, SHAPE)
            torch.cuda.current_stream().synchronize()
            return torch.equal(found.cpu(), expected[index % 4])

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(40)))


def test_buffers_are_kept():
    device_patches = DevicePatches(CUDA, torch.bfloat16)
    [given], _ = small_windows(1)
    device_patches(given, [0, 1], 320, 576, SHAPE)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        device_patches(given, [0, 1], 320, 576, SHAPE)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_targets_prompt_is_the_cpus(dtype):
    target = Alpamayo.from_pretrained("tiny", dtype=dtype, device="cuda")
    on_cpu = Alpamayo.from_pretrained("tiny")
    assert why_plain_images(target.device) is None
    for view, _ in held_out(3, seed=3):
        order = list(reversed(range(len(view.cameras))))
        turned = dataclasses.replace(
            view, cameras=tuple(view.cameras[at] for at in order), frames=view.frames[order]
        )
        expected = on_cpu.prompt(view)
        for found in (target.prompt(view), target.prompt(turned)):
            assert found.pixel_values.device == target.device and found.pixel_values.dtype == dtype
            assert torch.equal(found.pixel_values.cpu(), expected.pixel_values.to(dtype))
            for name in ("input_ids", "position_ids", "image_grid_thw", "ego_history_xyz"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name
        inputs = target.transformers_inputs(target.prompt(view))
        assert inputs["pixel_values"].device == target.device
    with pytest.raises(ValueError, match="frames are float64"):
        target.prompt(dataclasses.replace(view, frames=view.frames.astype(np.float64)))
