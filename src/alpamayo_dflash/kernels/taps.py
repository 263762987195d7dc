"""Bicubic resizing of uint8 images in whole numbers, as torch's CPU kernel does it: tables and plain form.

torch resizes uint8 with antialiasing along one side and then along the other. A level is a sum of taps, each
a level times an int16 weight; half a unit is added, the weights' bits are shifted out, and what lies outside
0 ... 255 is cut off, after either side. The filter is the cubic of Keys ("Cubic convolution interpolation for
digital image processing", 1981) with a = -1/2, as wide as the image shrinks. In whole numbers any order of
sums gives the same, so a kernel can be equal to the bit.

Shapes: N images, Y and X output rows and columns, T taps, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SUPPORT = 2.0  # the cubic is zero outside -2 ... 2
_A = -0.5
_MOST_BITS = 22


@dataclass(frozen=True)
class Taps:
    """What each output position along one side is made of.

    Attributes:
        first: int32 [X], the first input position that is read; first + T - 1 is inside the input.
        weights: int32 [T, X] of int16 values; zeros where an output needs fewer taps.
        bits: the weights' unit is 2**bits.
    """

    first: Tensor
    weights: Tensor
    bits: int

    def __len__(self) -> int:
        """T, the taps of every output."""
        return len(self.weights)

    def to(self, device: torch.device) -> Taps:
        """The same on a device."""
        return Taps(self.first.to(device), self.weights.to(device), self.bits)


def cubic_taps(size_in: int, size_out: int) -> Taps:
    """The taps from one size to another; equal sizes have one tap, which leaves the levels as they are.

    Args:
        size_in: pixels of a side.
        size_out: pixels that it gets.

    Returns:
        Tables on the CPU.
    """
    if size_in == size_out:
        bits = 14
        first = torch.arange(size_in, dtype=torch.int32, device="cpu")
        return Taps(first, torch.full((1, size_in), 1 << bits, dtype=torch.int32, device="cpu"), bits)
    first, weights_TX = _real_taps(size_in, size_out)
    bits = _bits(float(weights_TX.max()))
    scaled = weights_TX * (1 << bits)
    whole = (scaled + scaled.sign() * 0.5).trunc().to(torch.int32)
    return Taps(first.to(torch.int32), whole, bits)


def _real_taps(size_in: int, size_out: int) -> tuple[Tensor, Tensor]:
    """First positions int64 [X] and weights float64 [T, X], each output's weights in sum 1."""
    scale = size_in / size_out
    wide = max(scale, 1.0)
    centre = (torch.arange(size_out, dtype=torch.float64, device="cpu") + 0.5) * scale
    start = (centre - _SUPPORT * wide + 0.5).long().clamp(min=0)
    count = (centre + _SUPPORT * wide + 0.5).long().clamp(max=size_in) - start
    count = count.clamp(max=math.ceil(_SUPPORT * wide) * 2 + 1)
    taps = int(count.max())
    # At the far end reading begins earlier and the first weights are zero: no read is outside the input.
    first = start.clamp(max=size_in - taps)
    position_TX = first + torch.arange(taps, device="cpu").unsqueeze(-1)
    weights_TX = _cubic((position_TX - centre + 0.5) * (1.0 / wide))
    weights_TX[(position_TX < start) | (position_TX >= start + count)] = 0
    total = torch.zeros(size_out, dtype=torch.float64, device="cpu")
    for weights in weights_TX:  # one after another, as torch sums them
        total += weights
    return first, weights_TX / total


def _cubic(x: Tensor) -> Tensor:
    """The filter at distances x, float64; written so that every step rounds as torch's does."""
    x = x.abs()
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _bits(largest: float) -> int:
    """The most bits with which the largest weight is still an int16."""
    bits = 0
    while bits < _MOST_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return bits


def resize_plain(images_NYXC: Tensor, across: Taps, down: Taps) -> Tensor:
    """Resize uint8 images, columns first; the plain form of `kernels.resize`.

    Args:
        images_NYXC: [N, h, w, C].
        across: from w to the new width.
        down: from h to the new height.

    Returns:
        uint8 [N, new height, new width, C].
    """
    return _along(_along(images_NYXC, across, 2), down, 1)


def _along(images: Tensor, taps: Taps, side: int) -> Tensor:
    view = [1] * images.dim()
    view[side] = -1
    total = torch.tensor(1 << (taps.bits - 1), dtype=torch.int32, device=images.device)
    for tap, weights in enumerate(taps.weights):
        total = total + images.index_select(side, taps.first + tap).int() * weights.view(view)
    return (total >> taps.bits).clamp(0, 255).to(torch.uint8)
