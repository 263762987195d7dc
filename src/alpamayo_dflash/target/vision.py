"""The vision tower over many images at once.

transformers runs full attention image by image in a loop of Python; images of one size need no loop.
The same maths (specification 6) runs here on a batch of equal images, over the weights of transformers'
modules. A test holds the two equal.

Shapes: N images, T patches of an image in merge-block order, C vision hidden, M patches of a merged block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.target.qwen3 import rotate
from alpamayo_dflash.target.rotary import vision_rope_theta
from alpamayo_dflash.target.weights import hooked, why_module


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


def interpolated_positions(table_VC: Tensor, grid_h: int, grid_w: int, merge: int) -> Tensor:
    """The learned square table of positions, bilinearly interpolated to a grid: [T, C] in merge order."""
    side = round(table_VC.shape[0] ** 0.5)
    row, column = merge_order(grid_h, grid_w, merge)
    device = table_VC.device

    def corners(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.linspace(0, side - 1, count, dtype=torch.float32, device="cpu")[index]
        low = at.long()
        return low.to(device), (low + 1).clamp(max=side - 1).to(device), (at - low).to(device)

    top, bottom, down = corners(row, grid_h)
    left, right, across = corners(column, grid_w)
    weights = (
        (top, left, (1 - down) * (1 - across)),
        (top, right, (1 - down) * across),
        (bottom, left, down * (1 - across)),
        (bottom, right, down * across),
    )
    parts = [table_VC[r * side + c] * w[:, None].to(table_VC.dtype) for r, c, w in weights]
    return parts[0] + parts[1] + parts[2] + parts[3]


def rotary_tables_2d(
    grid_h: int, grid_w: int, merge: int, head_dim: int, device: torch.device, *, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the tower's axial rotary embedding, float32 [T, head_dim] (specification 6)."""
    row, column = merge_order(grid_h, grid_w, merge)
    half = head_dim // 2
    inverse = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)
    angles = torch.cat((row[:, None] * inverse, column[:, None] * inverse), dim=-1)
    angles = torch.cat((angles, angles), dim=-1).to(device)
    return angles.cos(), angles.sin()


def encode_equal_images(
    visual: Any, pixel_values: Tensor, grid_h: int, grid_w: int
) -> tuple[Tensor, list[Tensor]]:
    """Encode images of one grid.

    Args:
        visual: transformers' Qwen3-VL vision model.
        pixel_values: [N * T, channels * temporal * patch * patch].
        grid_h: patches from top to bottom.
        grid_w: patches from left to right.

    Returns:
        the merged features [N * T / M, text hidden] and the deepstack features, one such tensor a level.
    """
    config = visual.config
    merge, heads = config.spatial_merge_size, config.num_heads
    patches = grid_h * grid_w
    hidden_NTC = _embed_patches(visual.patch_embed, pixel_values).view(-1, patches, config.hidden_size)
    hidden_NTC = hidden_NTC + interpolated_positions(_table(visual.pos_embed), grid_h, grid_w, merge)
    cos, sin = rotary_tables_2d(
        grid_h, grid_w, merge, config.hidden_size // heads, hidden_NTC.device, theta=vision_rope_theta(config)
    )

    deepstack: list[Tensor] = []
    for index, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(block.norm1(hidden_NTC)).view(-1, patches, 3, heads, config.hidden_size // heads)
        q, k, v = qkv.unbind(2)
        q, k = (rotate(x.float(), cos, sin).to(v.dtype).transpose(1, 2) for x in (q, k))
        attended = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)
        hidden_NTC = hidden_NTC + block.attn.proj(attended.flatten(2))
        hidden_NTC = hidden_NTC + block.mlp(block.norm2(hidden_NTC))
        if index in config.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[config.deepstack_visual_indexes.index(index)]
            deepstack.append(merger(hidden_NTC.flatten(0, 1)))
    return visual.merger(hidden_NTC.flatten(0, 1)), deepstack


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


def encode_images(visual: Any, pixel_values: Tensor, image_grid_thw: Tensor) -> VisionFeatures:
    """Encode images of any sizes: runs of equal grids go together.

    Args:
        visual: transformers' Qwen3-VL vision model.
        pixel_values: [patches, channels * temporal * patch * patch], all images after one another.
        image_grid_thw: int64 [images, 3], in patches; t is 1, images are stills.

    Raises:
        ValueError: an image's temporal grid is not 1, or the patches do not add up.
    """
    grids = [tuple(int(n) for n in row) for row in image_grid_thw.tolist()]
    if any(t != 1 for t, _, _ in grids):
        raise ValueError(f"image_grid_thw has a temporal grid other than 1: {grids}")
    if sum(h * w for _, h, w in grids) != pixel_values.shape[0]:
        raise ValueError(f"{pixel_values.shape[0]} patches do not fill the image grids {grids}")
    embeds: list[Tensor] = []
    levels: list[list[Tensor]] = []
    start = first = 0
    while first < len(grids):
        last = first
        while last < len(grids) and grids[last] == grids[first]:
            last += 1
        _, grid_h, grid_w = grids[first]
        stop = start + (last - first) * grid_h * grid_w
        merged, deepstack = encode_equal_images(visual, pixel_values[start:stop], grid_h, grid_w)
        embeds.append(merged)
        levels.append(deepstack)
        start, first = stop, last
    stacked = [torch.cat([run[level] for run in levels]) for level in range(len(levels[0]))]
    return VisionFeatures(
        embeds=torch.cat(embeds),
        deepstack=torch.stack(stacked) if stacked else embeds[0].new_zeros(0, *torch.cat(embeds).shape),
    )
