"""From camera frames to the vision tower's patches on a GPU, equal to the bit to `images.plain_patches`.

The frames go to the device as they are, and two kernels make the patches of them there (`kernels/resize.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.common.machine import current
from alpamayo_dflash.common.turn import Turn
from alpamayo_dflash.kernels.taps import Taps, cubic_taps
from alpamayo_dflash.target.images import (
    Frames,
    FrameStaging,
    PatchShape,
    lie_pinned,
    scale_of_levels,
    upload,
)

_LEAST_CAPABILITY = (8, 0)  # what Triton is made for
_MOST_TAPS = 16
"""Tables kept, one a pair of sizes; a stream has two."""


def why_plain_images(device: torch.device) -> str | None:
    """Why frames are resized on the CPU; None where the kernels serve."""
    if device.type != "cuda":
        return f"the weights are on the {device.type}, not on a GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"the GPU's compute capability is {'.'.join(map(str, capability))}; the kernels need 8.0"
    return None


@dataclass
class _Buffers:
    """What calls of one size write over: the frames, and those resized across; pinned memory once needed."""

    frames: Tensor
    across: Tensor
    staging: FrameStaging | None = None


class DevicePatches:
    """Frames to patches on a device, in a dtype.

    It owns buffers for windows of one size, made anew when another size comes. Calls from several threads
    take turns, and on several streams each waits for the last one's kernels.

    Args:
        device: a GPU (see `why_plain_images`); the CPU where kernels are interpreted.
        dtype: of the patches.

    Attributes:
        device: the same.
        dtype: the same.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._turn = Turn("the way from frames to patches")
        self._scale = scale_of_levels(dtype).to(device)
        self._taps: dict[tuple[int, int], Taps] = {}
        self._buffers: _Buffers | None = None
        self._used: torch.cuda.Event | None = None
        self._last: tuple[Taps, Taps, PatchShape] | None = None

    def __reduce__(self) -> tuple[type[DevicePatches], tuple[torch.device, torch.dtype]]:
        """A copy, of a target say, begins with buffers of its own."""
        return DevicePatches, (self.device, self.dtype)

    def __call__(
        self, frames: Frames, order: Sequence[int], height: int, width: int, shape: PatchShape
    ) -> Tensor:
        """The patches of resized frames; the arguments are those of `images.plain_patches`.

        The frames have been read when this returns; the kernels may be at work still, on the current stream.

        Returns:
            [patches, 3·temporal·patch·patch] on the device, of its own.
        """
        with self._turn.taken(), torch.inference_mode(False), torch.no_grad(), current(self.device):
            across, down = self._taps_of(frames.shape[3], width), self._taps_of(frames.shape[2], height)
            buffers = self._buffers_for(frames, width)
            staging = None
            if not lie_pinned(frames):
                staging = buffers.staging = buffers.staging or self._staging_for(frames)
            self._after_last_use(buffers, across, down)
            copied = None
            try:
                upload(frames, order, buffers.frames, staging)
                copied = self._mark()
                self._last = across, down, shape
                return self._launch(buffers, *self._last)
            finally:
                self._used = self._mark()
                read = copied or self._used
                if read is not None:  # the frames are the caller's again, whatever happened
                    read.synchronize()

    def replay(self) -> Tensor:
        """Make the last call's patches again from the frames on the device: what benchmarks time."""
        with self._turn.taken(), torch.inference_mode(False), torch.no_grad(), current(self.device):
            assert self._buffers is not None
            assert self._last is not None
            return self._launch(self._buffers, *self._last)

    def _launch(self, buffers: _Buffers, across: Taps, down: Taps, shape: PatchShape) -> Tensor:
        from alpamayo_dflash.kernels.resize import resize_across, resize_down_to_patches

        images = buffers.frames.flatten(0, 1)
        count, _, width_in, channels = images.shape
        height, width = len(down.first), len(across.first)
        if width != width_in:
            resize_across(images, across, buffers.across)
            images = buffers.across
        out = torch.empty(
            count * height * width // shape.patch**2,
            channels * shape.temporal * shape.patch**2,
            dtype=self.dtype,
            device=self.device,
        )
        resize_down_to_patches(
            images,
            down,
            self._scale,
            out,
            patch=shape.patch,
            merge=shape.merge,
            temporal=shape.temporal,
        )
        return out

    def _taps_of(self, size_in: int, size_out: int) -> Taps:
        sizes = size_in, size_out
        if sizes not in self._taps:
            if len(self._taps) == _MOST_TAPS:
                del self._taps[next(iter(self._taps))]
            self._taps[sizes] = cubic_taps(*sizes).to(self.device)
        return self._taps[sizes]

    def _buffers_for(self, frames: Frames, width: int) -> _Buffers:
        """The buffers as they are where the size is the last call's, else new ones."""
        cameras, per_camera, height = frames.shape[:3]
        resized = cameras * per_camera if width != frames.shape[3] else 0
        across = (resized, height, width, 3)
        kept = self._buffers
        if kept is None or kept.frames.shape != frames.shape or kept.across.shape != across:
            self._buffers = None  # its memory first
            self._buffers = _Buffers(self._empty(frames.shape), self._empty(across))
        assert self._buffers is not None
        return self._buffers

    def _empty(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(tuple(shape), dtype=torch.uint8, device=self.device)

    def _staging_for(self, frames: Frames) -> FrameStaging:
        cameras, per_camera, height, width = frames.shape[:4]
        return FrameStaging((cameras, per_camera, height, width), pinned=self.device.type == "cuda")

    def _after_last_use(self, buffers: _Buffers, *tables: Taps) -> None:
        """Let the current stream wait for the last call's kernels, and keep what it uses from being freed."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._used is not None:
            stream.wait_event(self._used)
        numbers = [tensor for taps in tables for tensor in (taps.first, taps.weights)]
        for tensor in (buffers.frames, buffers.across, self._scale, *numbers):
            tensor.record_stream(stream)

    def _mark(self) -> torch.cuda.Event | None:
        """An event after what the current stream has been given, on a GPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event
