"""From camera frames to the vision tower's patches (specification 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_MAX_ASPECT = 200


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
    scaled = (ordered.float() - 127.5) / 127.5
    pixel_values = scaled.expand(-1, -1, temporal, -1, -1).flatten(1)
    grid = torch.tensor([[1, grid_h, grid_w]], dtype=torch.int64, device="cpu").expand(n, 3).contiguous()
    return pixel_values, grid
