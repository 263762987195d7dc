"""From camera frames to the vision tower's patches (specification 3.2), and the memory that frames lie in.

`plain_patches` is the way on the CPU; `images_fused.DevicePatches` is its fast form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.machine import current

_MAX_ASPECT = 200
Frames = npt.NDArray[np.uint8]
"""uint8 [cameras, frames, height, width, 3]"""


@dataclass(frozen=True)
class PatchShape:
    """How the vision tower cuts images: patch side, merged blocks' side, frames a patch."""

    patch: int
    merge: int
    temporal: int


PatchesOf = Callable[[Frames, Sequence[int], int, int, PatchShape], Tensor]
"""(frames, the cameras' places in prompt order, height, width, shape) -> pixel_values of resized frames"""


def smart_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size that an image is resized to: multiples of `factor`, its area within the limits.

    Args:
        height: pixels.
        width: pixels.
        factor: patch size times merge size.
        min_pixels: the least area.
        max_pixels: the greatest area.

    Raises:
        ValueError: the aspect ratio is above 200.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ValueError(f"image of {height}×{width} pixels: the aspect ratio must be at most {_MAX_ASPECT}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 [n, 3, h, w] bicubically with antialiasing, in torch's fixed-point kernel for uint8.

    That kernel runs on the CPU; a float resize rounded at the end differs by a level here and there.
    """
    if images.shape[-2:] == (height, width):
        return images
    return functional.interpolate(
        images.cpu(), size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )


def patches(images: Tensor, *, patch: int, merge: int, temporal: int) -> tuple[Tensor, Tensor]:
    """Cut resized images into the vision tower's patches, scaled to -1 ... 1.

    Args:
        images: uint8 [n, 3, h, w], h and w multiples of patch·merge.
        patch: pixels on a patch's side.
        merge: patches on the side of a merged block.
        temporal: the frames a patch spans; a still image is repeated.

    Returns:
        pixel_values float32 [n·gh·gw, 3·temporal·patch·patch], patches in merged-block order, and the grid
        int64 [n, 3], (1, gh, gw) in patches.
    """
    n, channels, height, width = images.shape
    grid_h, grid_w = height // patch, width // patch
    blocks = images.reshape(n, channels, grid_h // merge, merge, patch, grid_w // merge, merge, patch)
    ordered = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n * grid_h * grid_w, channels, 1, patch, patch)
    pixel_values = _scaled(ordered).expand(-1, -1, temporal, -1, -1).flatten(1)
    return pixel_values, patch_grid(n, height, width, patch)


def patch_grid(images: int, height: int, width: int, patch: int) -> Tensor:
    """int64 [images, 3], each (1, height, width) in patches."""
    grid = torch.tensor([[1, height // patch, width // patch]], dtype=torch.int64, device="cpu")
    return grid.expand(images, 3).contiguous()


def scale_of_levels(dtype: torch.dtype) -> Tensor:
    """What `patches` makes of the levels 0 ... 255, then rounded to a dtype: [256], on the CPU."""
    return _scaled(torch.arange(256, device="cpu")).to(dtype)


def _scaled(levels: Tensor) -> Tensor:
    return (levels.float() - 127.5) / 127.5


def plain_patches(frames: Frames, order: Sequence[int], height: int, width: int, shape: PatchShape) -> Tensor:
    """Resize a window's frames and cut them, on the CPU.

    Args:
        frames: uint8 [cameras, frames, h, w, 3].
        order: the cameras' places in `frames`, in the order of the prompt.
        height: of the resized images.
        width: likewise.
        shape: how they are cut.

    Returns:
        float32 [patches, 3·temporal·patch·patch], cameras in that order, each camera's frames as they are.
    """
    ordered = torch.from_numpy(np.ascontiguousarray(frames[list(order)])).flatten(0, 1)
    resized = resize(ordered.permute(0, 3, 1, 2), height, width)
    return patches(resized, patch=shape.patch, merge=shape.merge, temporal=shape.temporal)[0]


class FrameStaging:
    """Pinned memory for a window's frames: a GPU copies from it by itself, while the host does other work.

    A stream writes its frames into `frames` as they come and makes its windows on that array, or on a part of
    it; then a prompt needs no copy on the host. They may be written over once the prompt is there.

    Args:
        shape: cameras, frames a camera, height, width.
        pinned: ordinary memory instead, where there is no GPU to copy from it.

    Attributes:
        frames: uint8 [cameras, frames, height, width, 3], the memory itself.

    Raises:
        ValueError: pinned memory is asked for, and there is no CUDA device.
    """

    def __init__(self, shape: tuple[int, int, int, int], *, pinned: bool = True) -> None:
        if pinned and not torch.cuda.is_available():
            raise ValueError("pinned memory is CUDA's, and there is no CUDA device; give pinned=False")
        self._memory = torch.empty((*shape, 3), dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.frames: Frames = self._memory.numpy()

    def take(self, place: int, frames: Frames) -> Tensor:
        """Copy one camera's frames [frames, height, width, 3] to a place here, and return them there."""
        taken = self._memory[place]
        if _fit_torch(frames):
            taken.copy_(torch.from_numpy(frames))  # with several threads
        else:
            np.copyto(self.frames[place], frames)
        return taken


def staged(window: Window, device: torch.device) -> Window:
    """A window with its frames in pinned memory of its own, where a GPU reads them; elsewhere as it is."""
    if device.type != "cuda":
        return window
    cameras, per_camera, height, width = window.frames.shape[:4]
    with current(device):  # a thread of its own would bring up the first GPU
        staging = FrameStaging((cameras, per_camera, height, width))
    np.copyto(staging.frames, window.frames)
    return replace(window, frames=staging.frames)


def _fit_torch(frames: Frames) -> bool:
    """Whether torch takes an array as it is: it warns of read-only ones and refuses negative steps."""
    return frames.flags.writeable and min(frames.strides) >= 0


def lie_pinned(frames: Frames) -> bool:
    """Whether a GPU can copy a window's frames from where they lie, each camera's in one piece."""
    return all(
        _fit_torch(each) and each.flags.c_contiguous and torch.from_numpy(each).is_pinned() for each in frames
    )


def upload(frames: Frames, order: Sequence[int], out: Tensor, staging: FrameStaging | None) -> None:
    """Copy frames to a device on its current stream, camera by camera; pinned memory needs no waiting.

    Args:
        frames: uint8 [cameras, frames, h, w, 3].
        order: the cameras' places in `frames`, in the order of `out`.
        out: uint8 of the same shape on the device, written.
        staging: where each camera's frames are put before, while the last one's are on their way; None where
            they are pinned.
    """
    for place, camera in enumerate(order):
        each = frames[camera]
        source = torch.from_numpy(each) if staging is None else staging.take(place, each)
        out[place].copy_(source, non_blocking=True)
