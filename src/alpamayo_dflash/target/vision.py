"""The vision tower over many images, four at a time.

transformers runs full attention image by image in a loop of Python; images of one size need no loop.
The same maths (specification 6) runs here on a batch of equal images, over the weights of transformers'
modules. A test holds the two equal.

How a product rounds depends on its number of rows. So images always go four together, the last of them with
images of zeros, and what comes of an image does not depend on its company. On a CPU, where calls are what a
small tower's groups cost, only the products go by fours. `vision_fused` is the fast form.

Shapes: N images, T patches of an image in merge-block order, C vision hidden, M patches of a merged block,
K values of a patch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.target.rotary import vision_rope_theta
from alpamayo_dflash.target.weights import hooked, why_module

GROUP = 4
"""Images that the tower takes together."""

Grid = tuple[int, int]
"""Patches of an image from top to bottom, and from left to right."""


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
    tables = grid_tables(visual, grid_h, grid_w)
    if group is None:
        return _encode_together(visual, pixel_values, tables, _AllAtOnce())
    rows, tokens = group * grid_h * grid_w, len(pixel_values) // visual.config.spatial_merge_size**2
    missing = -len(pixel_values) % rows
    if missing:
        pixel_values = functional.pad(pixel_values, (0, 0, 0, missing))
    on_cpu = pixel_values.device.type == "cpu"
    one_thread = on_cpu and torch.get_num_threads() == 1
    if one_thread and tables.positions.dtype == torch.float32:
        merged, deepstack = _encode_together(visual, pixel_values, tables, _ProductsInGroups(group))
        return merged[:tokens], [level[:tokens] for level in deepstack]
    calls = _ImageByImage() if on_cpu and not one_thread else _AllAtOnce()
    parts = [_encode_together(visual, some, tables, calls) for some in pixel_values.split(rows)]
    together, levels = zip(*parts, strict=True)
    return torch.cat(together)[:tokens], [torch.cat(level)[:tokens] for level in zip(*levels, strict=True)]


class _AllAtOnce:
    """How the tower's modules are called: on all images together."""

    def product(self, x_NTI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        """X @ weight.T + bias, [N, T, O]."""
        return functional.linear(x_NTI, weight_OI, bias_O)

    def linear(self, module: Any, x_NTI: Tensor) -> Tensor:
        """A linear layer's output, [N, T, O]."""
        out: Tensor = module(x_NTI)
        return out

    def gelu(self, module: Any, hidden_NTC: Tensor) -> Tensor:
        """The output of an MLP or a merger, rows in the order of the images."""
        out: Tensor = module(hidden_NTC)
        return out


class _ImageByImage(_AllAtOnce):
    """Modules with a GELU are called on each image alone, so that its place in a group does not matter.

    A CPU's threads share a GELU's values out without regard to images, and what is left over of a share when
    it is cut into vectors is computed another way: with three threads, bits differed.
    """

    def gelu(self, module: Any, hidden_NTC: Tensor) -> Tensor:
        return torch.stack([module(hidden_TC) for hidden_TC in hidden_NTC])


@dataclass(frozen=True)
class _ProductsInGroups(_AllAtOnce):
    """A product a group, in one call, and all images at once in whatever takes each row or value alone.

    For float32 on one thread of a CPU: there norms, attention and GELU do not look at how many images there
    are, nor does a batch of products at how many it holds.

    Attributes:
        group: how many images a product takes; N is a multiple.
    """

    group: int

    def product(self, x_NTI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        images, rows, inputs = x_NTI.shape
        x_GRI = x_NTI.reshape(images // self.group, self.group * rows, inputs)
        weight_GIO = weight_OI.t().expand(len(x_GRI), -1, -1)
        return torch.baddbmm(bias_O, x_GRI, weight_GIO).view(images, rows, -1)

    def linear(self, module: Any, x_NTI: Tensor) -> Tensor:
        if _is(module, nn.Linear) and type(module.weight) is nn.Parameter and module.bias is not None:
            return self.product(x_NTI, module.weight, module.bias)
        return self._by_group(module, x_NTI)

    def gelu(self, module: Any, hidden_NTC: Tensor) -> Tensor:
        from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

        if _is(module, qwen.Qwen3VLVisionMLP):
            normed = hidden_NTC
        elif _is(module, qwen.Qwen3VLVisionPatchMerger):
            merged = (len(hidden_NTC), -1, module.hidden_size)
            after = module.use_postshuffle_norm
            normed = module.norm(hidden_NTC.view(merged) if after else hidden_NTC).view(merged)
        else:
            return self._by_group(module, hidden_NTC)
        return self.linear(module.linear_fc2, module.act_fn(self.linear(module.linear_fc1, normed)))

    def _by_group(self, module: Any, x_NTI: Tensor) -> Tensor:
        """What is more than its weights is called as it is."""
        return torch.cat([module(some) for some in x_NTI.split(self.group)])


def _is(module: Any, plain: type[nn.Module]) -> bool:
    """Whether a module computes what its class says: no other class, no hooks, no forward of its own."""
    return why_module(module, plain) is None and "forward" not in vars(module)


def _encode_together(
    visual: Any, pixel_values: Tensor, tables: GridTables, calls: _AllAtOnce
) -> tuple[Tensor, list[Tensor]]:
    config = visual.config
    heads, patches, width = config.num_heads, len(tables.positions), config.hidden_size
    pixels_NTK = pixel_values.view(-1, patches, pixel_values.shape[-1])
    hidden_NTC = _embed_patches(visual.patch_embed, pixels_NTK, calls).view(-1, patches, width)
    hidden_NTC = hidden_NTC + tables.positions
    cos, sin = _wide(tables, heads)
    deepstack: list[Tensor] = []
    for index, block in enumerate(visual.blocks):
        qk, v = calls.linear(block.attn.qkv, block.norm1(hidden_NTC)).split((2 * width, width), dim=-1)
        qk = _rotated(qk.float(), cos, sin, width // heads).to(v.dtype)
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (*qk.chunk(2, dim=-1), v))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        hidden_NTC = hidden_NTC + calls.linear(block.attn.proj, attended.flatten(2))
        hidden_NTC = hidden_NTC + calls.gelu(block.mlp, block.norm2(hidden_NTC))
        if index in config.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[config.deepstack_visual_indexes.index(index)]
            deepstack.append(calls.gelu(merger, hidden_NTC).flatten(0, -2))
    return calls.gelu(visual.merger, hidden_NTC).flatten(0, -2), deepstack


def _wide(tables: GridTables, heads: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 2·C] for q and k side by side; the sines of a head's first half are negative."""
    first, second = tables.sin.chunk(2, dim=-1)
    return tables.cos.repeat(1, 2 * heads), torch.cat((-first, second), dim=-1).repeat(1, 2 * heads)


def _rotated(qk: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """`rotate` of q and k side by side [N, T, 2·C], to the bit: on a CPU long rows are quicker than heads."""
    first, second = qk.unflatten(-1, (-1, 2, head_dim // 2)).unbind(-2)
    return qk * cos + torch.stack((second, first), dim=-2).flatten(2) * sin


def _embed_patches(patch_embed: Any, pixels_NTK: Tensor, calls: _AllAtOnce) -> Tensor:
    """[..., C]. A convolution whose steps are its size is a product."""
    projection = patch_embed.proj
    if hooked(patch_embed) or why_module(projection, nn.Conv3d) is not None or projection.bias is None:
        return calls.linear(patch_embed, pixels_NTK)
    pixels_NTK = pixels_NTK.to(projection.weight.dtype)
    return calls.product(pixels_NTK, projection.weight.flatten(1), projection.bias)


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
