"""The vision tower over many images, four at a time.

transformers runs full attention image by image in a loop of Python; images of one size need no loop.
The same maths (specification 6) runs here on a batch of equal images, over the weights of transformers'
modules. A test holds the two equal.

How a product rounds depends on its number of rows. So images always go four together, the last of them with
images of zeros, and what comes of an image does not depend on its company. `vision_fused` is the fast form.

Shapes: N images, T patches of an image in merge-block order, C vision hidden, M patches of a merged block,
K values of a patch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.target.qwen3 import rotate
from alpamayo_dflash.target.rotary import vision_rope_theta
from alpamayo_dflash.target.weights import hooked, why_module

GROUP = 4
"""Images that the tower takes together."""

Grid = tuple[int, int]
"""Patches of an image from top to bottom, and from left to right."""


_Call = Callable[[Any, Tensor], Tensor]
"""(a module that is a tower's MLP or merger, hidden [N, T, C]) -> its output [..., columns]."""


@dataclass(frozen=True)
class VisionFeatures:
    """What the text decoder gets of the images.

    Attributes:
        embeds: [image tokens, text hidden], written over the image tokens.
        deepstack: [levels, image tokens, text hidden], added after the first text layers.
    """

    embeds: Tensor
    deepstack: Tensor


def merge_order(grid_h: int, grid_w: int, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, int64 [T], in merge-block order (blocks row by row, then inside them)."""
    rows = torch.arange(grid_h, device="cpu").view(grid_h // merge, 1, merge, 1)
    columns = torch.arange(grid_w, device="cpu").view(1, grid_w // merge, 1, merge)
    shape = (grid_h // merge, grid_w // merge, merge, merge)
    return rows.expand(shape).flatten(), columns.expand(shape).flatten()


@functools.lru_cache(maxsize=16)
def _corners(side: int, grid_h: int, grid_w: int, merge: int) -> tuple[Tensor, Tensor]:
    """Four entries of a square table for each patch, int64 [4, T], and their weights, float32 [4, T]."""
    row, column = merge_order(grid_h, grid_w, merge)

    def between(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.linspace(0, side - 1, count, dtype=torch.float32, device="cpu")[index]
        low = at.long()
        return low, (low + 1).clamp(max=side - 1), at - low

    top, bottom, down = between(row, grid_h)
    left, right, across = between(column, grid_w)
    rows, columns = torch.stack((top, top, bottom, bottom)), torch.stack((left, right, left, right))
    weights = (1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across
    return rows * side + columns, torch.stack(weights)


def interpolated_positions(table_VC: Tensor, grid_h: int, grid_w: int, merge: int) -> Tensor:
    """The learned square table of positions, bilinearly interpolated to a grid: [T, C] in merge order."""
    device = table_VC.device
    with torch.inference_mode(False):  # what is kept serves training too
        corners = _corners(round(table_VC.shape[0] ** 0.5), grid_h, grid_w, merge)
    index, weight = (each.to(device) for each in corners)
    parts = table_VC[index] * weight.unsqueeze(-1).to(table_VC.dtype)
    return parts[0] + parts[1] + parts[2] + parts[3]


@functools.lru_cache(maxsize=16)
def _angles(grid_h: int, grid_w: int, merge: int, head_dim: int, theta: float) -> Tensor:
    """Radians by which the tower's axial rotary embedding turns, float32 [T, head_dim] (specification 6)."""
    row, column = merge_order(grid_h, grid_w, merge)
    half = head_dim // 2
    inverse = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)
    angles = torch.cat((row[:, None] * inverse, column[:, None] * inverse), dim=-1)
    return torch.cat((angles, angles), dim=-1)


def rotary_tables_2d(
    grid_h: int, grid_w: int, merge: int, head_dim: int, device: torch.device, *, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the tower's axial rotary embedding, float32 [T, head_dim] (specification 6)."""
    with torch.inference_mode(False):
        angles = _angles(grid_h, grid_w, merge, head_dim, theta).to(device)
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class GridTables:
    """What of the tower depends on the images' size alone.

    Attributes:
        positions: [T, C].
        cos: float32 [T, D].
        sin: float32 [T, D].
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor


def grid_tables(visual: Any, grid_h: int, grid_w: int) -> GridTables:
    """The tables for one grid, on the tower's device."""
    config, merge = visual.config, visual.config.spatial_merge_size
    positions = interpolated_positions(_table(visual.pos_embed), grid_h, grid_w, merge)
    head_dim, theta = config.hidden_size // config.num_heads, vision_rope_theta(config)
    cos, sin = rotary_tables_2d(grid_h, grid_w, merge, head_dim, positions.device, theta=theta)
    return GridTables(positions, cos, sin)


def encode_equal_images(
    visual: Any, pixel_values: Tensor, grid_h: int, grid_w: int, *, group: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Encode images of one grid.

    Args:
        visual: transformers' Qwen3-VL vision model.
        pixel_values: [N * T, channels * temporal * patch * patch].
        grid_h: patches from top to bottom.
        grid_w: patches from left to right.
        group: how many images go together; None for all, which is how the tower is trained.

    Returns:
        the merged features [N * T / M, text hidden] and the deepstack features, one such tensor a level.
    """
    tables, tokens = (
        grid_tables(visual, grid_h, grid_w),
        len(pixel_values) // visual.config.spatial_merge_size**2,
    )
    if group is None:
        return _encode_together(visual, pixel_values, tables, _all_at_once)
    threads = pixel_values.device.type == "cpu" and torch.get_num_threads() > 1
    call = _image_by_image if threads else _all_at_once
    rows = group * grid_h * grid_w
    parts = [
        _encode_together(visual, functional.pad(some, (0, 0, 0, rows - len(some))), tables, call)
        for some in pixel_values.split(rows)
    ]
    merged, deepstack = zip(*parts, strict=True)
    tokens = len(pixel_values) // visual.config.spatial_merge_size**2
    return torch.cat(merged)[:tokens], [torch.cat(level)[:tokens] for level in zip(*deepstack, strict=True)]


def _encode_together(
    visual: Any, pixel_values: Tensor, tables: GridTables, call: _Call
) -> tuple[Tensor, list[Tensor]]:
    config = visual.config
    heads, patches = config.num_heads, len(tables.positions)
    hidden_NTC = _embed_patches(visual.patch_embed, pixel_values).view(-1, patches, config.hidden_size)
    hidden_NTC = hidden_NTC + tables.positions
    deepstack: list[Tensor] = []
    for index, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(block.norm1(hidden_NTC)).view(-1, patches, 3, heads, config.hidden_size // heads)
        q, k, v = qkv.unbind(2)
        q, k = (rotate(x.float(), tables.cos, tables.sin).to(v.dtype).transpose(1, 2) for x in (q, k))
        attended = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)
        hidden_NTC = hidden_NTC + block.attn.proj(attended.flatten(2))
        hidden_NTC = hidden_NTC + call(block.mlp, block.norm2(hidden_NTC))
        if index in config.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[config.deepstack_visual_indexes.index(index)]
            deepstack.append(call(merger, hidden_NTC).flatten(0, -2))
    return call(visual.merger, hidden_NTC).flatten(0, -2), deepstack


def _all_at_once(module: Any, hidden_NTC: Tensor) -> Tensor:
    out: Tensor = module(hidden_NTC)
    return out


def _image_by_image(module: Any, hidden_NTC: Tensor) -> Tensor:
    """Call a module with a GELU on each image alone, so that an image's place in a group does not matter.

    A CPU's threads share a GELU's values out without regard to images, and what is left over of a share when
    it is cut into vectors is computed another way: with three threads, bits differed.
    """
    return torch.stack([module(hidden_TC) for hidden_TC in hidden_NTC])


def _embed_patches(patch_embed: Any, pixel_values: Tensor) -> Tensor:
    """[patches, C]. A convolution whose steps are its size is a product."""
    projection = patch_embed.proj
    if hooked(patch_embed) or why_module(projection, nn.Conv3d) is not None:
        called: Tensor = patch_embed(pixel_values)
        return called
    pixels = pixel_values.to(projection.weight.dtype)
    return functional.linear(pixels, projection.weight.flatten(1), projection.bias)


def _table(pos_embed: nn.Module) -> Tensor:
    """The rows [V, C] of the table of positions, or what an adapter on it makes of them."""
    table: Tensor = pos_embed.weight  # type: ignore[assignment]
    if why_module(pos_embed, nn.Embedding) is None:
        return table
    called: Tensor = pos_embed(torch.arange(len(table), device=table.device))
    return called


def encode_images(
    visual: Any, pixel_values: Tensor, image_grid_thw: Tensor, *, group: int | None = GROUP
) -> VisionFeatures:
    """Encode images of any sizes.

    Args:
        visual: transformers' Qwen3-VL vision model.
        pixel_values: [patches, channels * temporal * patch * patch], all images after one another.
        image_grid_thw: int64 [images, 3], in patches; t is 1, images are stills.
        group: how many equal images go together; None for all, whose features then depend on their company.

    Raises:
        ValueError: an image's temporal grid is not 1, or the patches do not add up.
    """
    grids = image_grids(image_grid_thw, len(pixel_values))
    runs: list[tuple[Tensor, list[Tensor]]] = []
    start = 0
    for (grid_h, grid_w), count in equal_runs(grids):
        stop = start + count * grid_h * grid_w
        runs.append(encode_equal_images(visual, pixel_values[start:stop], grid_h, grid_w, group=group))
        start = stop
    embeds = torch.cat([merged for merged, _ in runs])
    levels = [torch.cat(level) for level in zip(*(deepstack for _, deepstack in runs), strict=True)]
    return VisionFeatures(embeds, torch.stack(levels) if levels else embeds.new_zeros(0, *embeds.shape))


def image_grids(image_grid_thw: Tensor, patches: int) -> list[Grid]:
    """The images' grids, for the host.

    Args:
        image_grid_thw: int64 [images, 3]; on a GPU the host waits for it.
        patches: that there are of all images.

    Raises:
        ValueError: an image's temporal grid is not 1, or the patches do not add up.
    """
    grids = [tuple(int(n) for n in row) for row in image_grid_thw.tolist()]
    if any(t != 1 for t, _, _ in grids):
        raise ValueError(f"image_grid_thw has a temporal grid other than 1: {grids}")
    if sum(h * w for _, h, w in grids) != patches:
        raise ValueError(f"{patches} patches do not fill the image grids {grids}")
    return [(h, w) for _, h, w in grids]


def equal_runs(grids: Iterable[Grid]) -> list[tuple[Grid, int]]:
    """Grids that follow each other as one, with how many there are of it."""
    return [(grid, len(list(run))) for grid, run in itertools.groupby(grids)]
