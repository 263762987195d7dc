"""Camera frames to the vision tower's patches in two kernels, equal to the bit to torch's resize on the CPU.

The first resizes across and keeps levels, as torch does between its two sides; the second resizes down,
scales, and writes each level to its places in the patches. `taps.resize_plain` is the plain form of the
resizing, `target/images.patches` that of the rest. Where the width stays the first is left out; where the
height stays the second reads one tap.

Shapes: N images, Y and X output rows and columns, T taps, P patches of all images.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from alpamayo_dflash.kernels.taps import Taps

_CHANNELS = tl.constexpr(3)


# Unspecialised, the new width hides that stores could be 16 bytes wide. The compiler would give each thread
# as many bytes in a row, for loads too, and a warp's loads would lie 50 bytes apart, not side by side.
@triton.jit(do_not_specialize=["width_out"])
def across_kernel(
    images_ptr,
    first_ptr,
    weights_ptr,
    resized_ptr,
    rows,
    width_in,
    width_out,
    TAPS: tl.constexpr,
    BITS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Program (r, b) makes BLOCK_B bytes of BLOCK_R rows; a row's bytes are its columns' channels in turn."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    byte = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside_b = byte < width_out * _CHANNELS
    inside = (row < rows)[:, None] & inside_b[None, :]
    column = byte // _CHANNELS
    first = tl.load(first_ptr + column, mask=inside_b, other=0)
    row = row.to(tl.int64)[:, None]
    at = images_ptr + row * (width_in * _CHANNELS) + (first * _CHANNELS + byte % _CHANNELS)[None, :]
    total = tl.full([BLOCK_R, BLOCK_B], 1 << (BITS - 1), tl.int32)
    for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
        weight = tl.load(weights_ptr + tap * width_out + column, mask=inside_b, other=0)
        level = tl.load(at + tap * _CHANNELS, mask=inside, other=0)
        total += level.to(tl.int32) * weight[None, :]
    total = tl.minimum(tl.maximum(total >> BITS, 0), 255)
    out = resized_ptr + row * (width_out * _CHANNELS) + byte[None, :]
    tl.store(out, total.to(tl.uint8), mask=inside)


@triton.jit
def down_kernel(
    images_ptr,
    first_ptr,
    weights_ptr,
    scale_ptr,
    out_ptr,
    rows,
    height_in,
    height_out,
    width,
    TAPS: tl.constexpr,
    BITS: tl.constexpr,
    UNROLL: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    TEMPORAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Program (r, x) makes BLOCK_R of the rows of all images, BLOCK_X columns of them, in all channels."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    x = (tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    inside_r = row < rows
    inside = inside_r[:, None] & (x < width)
    y, image = row % height_out, (row // height_out).to(tl.int64)
    first = tl.load(first_ptr + y, mask=inside_r, other=0)
    at = images_ptr + (image * height_in + first)[:, None] * (width * _CHANNELS) + x * _CHANNELS

    # A patch's place: image, then block by block, then inside its block.
    patch_y, patch_x = (y // PATCH)[:, None], x // PATCH
    across = width // PATCH
    block = (patch_y // MERGE) * (across // MERGE) + patch_x // MERGE
    patch = (block * MERGE + patch_y % MERGE) * MERGE + patch_x % MERGE
    patch += image[:, None] * (height_out // PATCH * across)
    pixels: tl.constexpr = PATCH * PATCH
    out = out_ptr + patch * (_CHANNELS * TEMPORAL * pixels) + (y % PATCH)[:, None] * PATCH + x % PATCH

    for channel in tl.static_range(_CHANNELS):
        total = tl.full([BLOCK_R, BLOCK_X], 1 << (BITS - 1), tl.int32)
        for tap in tl.range(0, TAPS, loop_unroll_factor=UNROLL):
            weight = tl.load(weights_ptr + tap * height_out + y, mask=inside_r, other=0)
            level = tl.load(at + tap * (width * _CHANNELS) + channel, mask=inside, other=0)
            total += level.to(tl.int32) * weight[:, None]
        total = tl.minimum(tl.maximum(total >> BITS, 0), 255)
        # A table, for then no division or rounding of the device's own is in it.
        scaled = tl.load(scale_ptr + total)
        for repeat in tl.static_range(TEMPORAL):
            tl.store(out + (channel * TEMPORAL + repeat) * pixels, scaled, mask=inside)


@dataclass(frozen=True)
class Tile:
    """What a program makes: rows, bytes or columns of them; its warps; the taps in a turn of its loop."""

    rows: int
    columns: int
    warps: int
    unroll: int = 16


ACROSS = Tile(8, 128, 4)
DOWN = Tile(4, 64, 4)


def resize_across(frames_NYXC: Tensor, taps: Taps, out_NYXC: Tensor, tile: Tile = ACROSS) -> None:
    """Resize the rows of uint8 images.

    Args:
        frames_NYXC: uint8 [N, h, w, 3], contiguous.
        taps: from w to the new width, on the images' device.
        out_NYXC: uint8 [N, h, new width, 3], written.
        tile: a program's.
    """
    count, height, width, _ = frames_NYXC.shape
    width_out, rows = out_NYXC.shape[2], count * height
    across_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(width_out * 3, tile.columns))](
        frames_NYXC,
        taps.first,
        taps.weights,
        out_NYXC,
        rows,
        width,
        width_out,
        TAPS=len(taps),
        BITS=taps.bits,
        UNROLL=min(tile.unroll, len(taps)),
        BLOCK_R=tile.rows,
        BLOCK_B=tile.columns,
        num_warps=tile.warps,
    )


def resize_down_to_patches(
    frames_NYXC: Tensor,
    taps: Taps,
    scale_256: Tensor,
    out_PE: Tensor,
    *,
    patch: int,
    merge: int,
    temporal: int,
    tile: Tile = DOWN,
) -> None:
    """Resize the columns of uint8 images, put a scale's values for levels, and cut them into patches.

    Args:
        frames_NYXC: uint8 [N, h, w, 3], contiguous; w is a multiple of patch·merge.
        taps: from h to the new height, a multiple of patch·merge, on the images' device.
        scale_256: what each level becomes, in the dtype of the patches.
        out_PE: [N·patches, 3·temporal·patch·patch], written.
        patch: pixels on a patch's side.
        merge: patches on the side of a merged block.
        temporal: how often a patch's pixels are repeated.
        tile: a program's.
    """
    count, height, width, _ = frames_NYXC.shape
    height_out = len(taps.first)
    rows = count * height_out
    assert out_PE.shape == (rows * width // patch**2, 3 * temporal * patch**2)
    down_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns))](
        frames_NYXC,
        taps.first,
        taps.weights,
        scale_256,
        out_PE,
        rows,
        height,
        height_out,
        width,
        TAPS=len(taps),
        BITS=taps.bits,
        UNROLL=min(tile.unroll, len(taps)),
        PATCH=patch,
        MERGE=merge,
        TEMPORAL=temporal,
        BLOCK_R=tile.rows,
        BLOCK_X=tile.columns,
        num_warps=tile.warps,
    )
