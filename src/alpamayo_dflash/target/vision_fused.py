"""The vision tower in its fast form: four images at a time as one CUDA graph, for a GPU in bfloat16.

The arithmetic of `target/vision.py` with the same roundings; only the order inside sums differs. It is the
plain form, which the tests hold this one against. The weights are read where they lie in transformers'
modules; what depends on the images' size alone is made once for each size.

Shapes: N images, T patches of an image in merge-block order, R = N·T rows, C vision hidden, M patches of a
merged block, K values of a patch, D head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.common.graphs import CapturedCall, Recent
from alpamayo_dflash.common.machine import is_hopper
from alpamayo_dflash.target.qwen3_fused import why_device
from alpamayo_dflash.target.vision import (
    GROUP,
    Grid,
    GridTables,
    VisionFeatures,
    equal_runs,
    grid_tables,
    image_grids,
)
from alpamayo_dflash.target.vlm import Qwen3VLTarget
from alpamayo_dflash.target.weights import (
    BiasedLinear,
    FP8BiasedLinear,
    Rows,
    biased_linear,
    gelu_mlp,
    plain_parameters,
    why_module,
    why_projection,
)

if TYPE_CHECKING:
    from alpamayo_dflash.kernels.vision import AttentionKind

Gelu = Literal["rounded", "epilogue"]
_Biased = BiasedLinear | FP8BiasedLinear

_GELU = "gelu_pytorch_tanh"
_HEAD_WIDTHS = (16, 256)
_HEAD_MULTIPLE = 8  # what a library's attention takes without copies
_KEPT = 4
"""Sizes of images whose graphs are kept."""


@dataclass(frozen=True)
class VisionPlan:
    """Who computes what. Features of one plan do not depend on company; those of two plans round apart.

    Attributes:
        attention: see `kernels.vision.attend_images`; None for what suits the GPU.
        gelu: whether an MLP's product is `rounded` before its GELU, as in the plain form, or goes into it
            unrounded in the product's `epilogue` (on a GPU only); None for what suits the device.
        streams: groups of images that run side by side, each with its own buffers and graph.
    """

    attention: AttentionKind | None = None
    gelu: Gelu | None = None
    streams: int = 2

    def attention_on(self, device: torch.device) -> AttentionKind:
        """Who computes attention on a device: on Hopper cuDNN's is the fastest, elsewhere flash is."""
        if self.attention is not None:
            return self.attention
        return "cudnn" if is_hopper(device) else "flash"

    def gelu_on(self, device: torch.device) -> Gelu:
        """Where the GELU is taken on a device: on a GPU it saves a pass over the product."""
        return self.gelu or ("epilogue" if device.type == "cuda" else "rounded")


@dataclass(frozen=True)
class _Norm:
    """A layer norm's weight [C], bias [C] and eps."""

    weight: Tensor
    shift: Tensor
    eps: float

    @classmethod
    def of(cls, norm: Any) -> _Norm:
        """Read one of the tower's norms."""
        return cls(norm.weight.detach(), norm.bias.detach(), float(norm.eps))

    def after(
        self, hidden_RC: Tensor, added_RC: Tensor | None, reader: _Biased | None = None
    ) -> tuple[Tensor, Any]:
        """The sum of both and its norm (`add_layer_norm`), cast where the layer that reads it takes that."""
        from alpamayo_dflash.kernels.vision import add_layer_norm, add_layer_norm_cast

        norm = add_layer_norm if reader is None or not reader.by_row else add_layer_norm_cast
        return norm(hidden_RC, added_RC, self.weight, self.shift, self.eps)


@dataclass(frozen=True)
class _Block:
    """The weights of one block."""

    attention_norm: _Norm
    qkv: _Biased
    out: _Biased
    mlp_norm: _Norm
    up: _Biased
    down: _Biased

    @classmethod
    def of(cls, block: Any) -> _Block:
        """Read one of transformers' blocks."""
        linears = (block.attn.qkv, block.attn.proj, block.mlp.linear_fc1, block.mlp.linear_fc2)
        qkv, out, up, down = (biased_linear(linear) for linear in linears)
        return cls(_Norm.of(block.norm1), qkv, out, _Norm.of(block.norm2), up, down)


@dataclass(frozen=True)
class _Merger:
    """The weights of one merger: of the tower's end, or of a level of deepstack features."""

    norm: _Norm
    up: _Biased
    down: _Biased

    @classmethod
    def of(cls, merger: Any) -> _Merger:
        """Read one of transformers' mergers."""
        return cls(_Norm.of(merger.norm), biased_linear(merger.linear_fc1), biased_linear(merger.linear_fc2))

    def merge(self, normed: Tensor) -> Tensor:
        """Text features [R / M, text hidden] of normed rows, seen as [R / M, M·C]."""
        return self.down(functional.gelu(self.up(normed.view(-1, self.up.weight.shape[1]))))


class _Tower:
    """The work itself: weights, and what is launched for some images of one size."""

    def __init__(self, visual: Any, plan: VisionPlan) -> None:
        config = visual.config
        self._heads = config.num_heads
        self._patch = biased_linear(visual.patch_embed.proj)
        self._blocks = [_Block.of(block) for block in visual.blocks]
        self._merger = _Merger.of(visual.merger)
        tapped = config.deepstack_visual_indexes
        self._levels = {
            index: _Merger.of(visual.deepstack_merger_list[tapped.index(index)])
            for index in sorted(set(tapped))
            if index < len(self._blocks)
        }
        self.levels, self.inputs = len(self._levels), self._patch.weight.shape[1]
        self.width = self._merger.down.weight.shape[0]
        self.dtype, self.device = self._patch.weight.dtype, self._patch.weight.device
        self._attention, self._gelu = plan.attention_on(self.device), plan.gelu_on(self.device)

    def __call__(self, pixels_RK: Tensor, tables: GridTables) -> tuple[Tensor, list[Tensor]]:
        """Merged and deepstack features, [R / M, text hidden] each."""
        hidden_RC, added_RC = tables.positions, self._patch(pixels_RK)
        deepstack: list[Tensor] = []
        # Each norm and what reads it; a merger sees its rows as others, which are cast only then.
        norms = [(block.attention_norm, block.qkv) for block in self._blocks]
        for index, (norm, reader) in enumerate([*norms, (self._merger.norm, None)]):
            hidden_RC, normed_RC = norm.after(hidden_RC, added_RC, reader)
            if index - 1 in self._levels:  # of the block before, whose sum this is
                merger = self._levels[index - 1]
                merged = hidden_RC.view(-1, merger.up.weight.shape[1])
                deepstack.append(merger.merge(merger.norm.after(merged, None)[1]))
            if index < len(self._blocks):
                hidden_RC, added_RC = self._run(self._blocks[index], hidden_RC, normed_RC, tables)
        return self._merger.merge(normed_RC), deepstack

    def _run(
        self, block: _Block, hidden_RC: Tensor, normed_RC: Rows, tables: GridTables
    ) -> tuple[Tensor, Tensor]:
        """A block from its normed input to what its MLP adds: hidden, and what is to be added to it."""
        from alpamayo_dflash.kernels.vision import attend_images, rotate_in_place

        qkv = block.qkv(normed_RC)
        rotate_in_place(qkv, tables.cos, tables.sin, self._heads)
        attended = attend_images(qkv, len(tables.cos), self._heads, self._attention)
        hidden_RC, normed_RC = block.mlp_norm.after(hidden_RC, block.out(attended), block.up)
        return hidden_RC, gelu_mlp(block.up, block.down, normed_RC, rounded=self._gelu == "rounded")


class FusedVision:
    """A target's vision tower: a graph for each size of images.

    It owns buffers, so one call at a time. The weights may not move; positions are kept for each size.

    Args:
        visual: transformers' Qwen3-VL vision model; see `why_plain_vision`.
        plan: who computes what.
        graph: capture what is run; left out, on a GPU.

    Attributes:
        kept: by size, the last used at the end; at most four.
    """

    def __init__(self, visual: Any, plan: VisionPlan | None = None, *, graph: bool | None = None) -> None:
        self._visual, self._plan = visual, plan or VisionPlan()
        self._tower = _Tower(visual, self._plan)
        self._graph = self._tower.device.type == "cuda" if graph is None else graph
        self._merged = int(visual.config.spatial_merge_size) ** 2
        self.kept: Recent[Grid, list[_Lane]] = Recent(_KEPT)

    @torch.inference_mode()
    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor) -> VisionFeatures:
        """Encode images of any sizes, as `encode_images` does; the host waits for a grid on a GPU alone.

        Args:
            pixel_values: [patches, K], all images after one another.
            image_grid_thw: int64 [images, 3], in patches; t is 1, images are stills.

        Raises:
            ValueError: an image's temporal grid is not 1, or the patches do not add up.
        """
        grids, tower = image_grids(image_grid_thw, len(pixel_values)), self._tower
        tokens = len(pixel_values) // self._merged
        features = VisionFeatures(
            torch.empty(tokens, tower.width, dtype=tower.dtype, device=tower.device),
            torch.empty(tower.levels, tokens, tower.width, dtype=tower.dtype, device=tower.device),
        )
        start = 0
        for grid, count in equal_runs(grids):
            groups = pixel_values[start : start + count * grid[0] * grid[1]].split(GROUP * grid[0] * grid[1])
            self._run(self._lanes(grid), groups, features, start // self._merged)
            start += count * grid[0] * grid[1]
        return features

    def _run(
        self, lanes: Sequence[_Lane], groups: Sequence[Tensor], features: VisionFeatures, token: int
    ) -> None:
        """Encode groups of one size in turns of lanes; `token` is where the first one's features go."""
        with _side_by_side(lanes):
            for index, pixels in enumerate(groups):
                tokens = len(pixels) // self._merged
                lanes[index % len(lanes)].run(pixels, features, token, tokens)
                token += tokens

    def _lanes(self, grid: Grid) -> list[_Lane]:
        """The buffers and graphs for images of one size."""
        return self.kept.of(grid, lambda: self._made(grid))

    def _made(self, grid: Grid) -> list[_Lane]:
        tables, count = grid_tables(self._visual, *grid), self._plan.streams
        apart = count > 1 and self._graph
        return [_Lane(self._tower, tables, graph=self._graph, apart=apart) for _ in range(count)]


@contextlib.contextmanager
def _side_by_side(lanes: Sequence[_Lane]) -> Iterator[None]:
    """Lanes' streams begin after what was launched before, and what is launched after waits for them."""
    streams = [lane.stream for lane in lanes if lane.stream is not None]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    try:
        yield
    finally:
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)


class _Lane:
    """The buffers of one group of images, and on a GPU the graph.

    Args:
        tower: what is run.
        tables: of the images' size.
        graph: whether it is captured.
        apart: whether it has a stream of its own, or runs on the current one.
    """

    def __init__(self, tower: _Tower, tables: GridTables, *, graph: bool, apart: bool) -> None:
        self._tower, self._tables = tower, tables
        rows = GROUP * len(tables.positions)
        self.pixels = torch.zeros(rows, tower.inputs, dtype=tower.dtype, device=tower.device)
        self._out: tuple[Tensor, list[Tensor]] | None = None
        self.stream = torch.cuda.Stream() if apart else None
        self.work = CapturedCall(self._launch).replay if graph else self._launch

    def run(self, pixels: Tensor, features: VisionFeatures, token: int, tokens: int) -> None:
        """Encode up to a group's pixels; their features go to `tokens` places from `token` on."""
        with torch.cuda.stream(self.stream):
            self.pixels[: len(pixels)] = pixels
            self.pixels[len(pixels) :] = 0
            self.work()
            assert self._out is not None
            merged, deepstack = self._out
            features.embeds[token : token + tokens] = merged[:tokens]
            for level, found in zip(features.deepstack, deepstack, strict=True):
                level[token : token + tokens] = found[:tokens]

    def _launch(self) -> None:
        self._out = self._tower(self.pixels, self._tables)


def why_plain_vision(target: Qwen3VLTarget) -> str | None:
    """Why a target's vision tower must run in its plain form; None where the fast one serves."""
    visual = target.vlm.model.visual
    return why_device(visual.patch_embed.proj.weight) or misfit_vision(visual, target.dtype)


def misfit_vision(visual: Any, dtype: torch.dtype) -> str | None:
    """What of a tower is more than its weights tell, or is not what the fast form computes."""
    width = visual.config.hidden_size // visual.config.num_heads
    least, most = _HEAD_WIDTHS
    if not least <= width <= most or width % _HEAD_MULTIPLE:
        return (
            f"the vision tower's heads are {width} wide; the fast form takes multiples of {_HEAD_MULTIPLE} "
            f"from {least} to {most}"
        )
    if visual.config.hidden_act != _GELU:
        return f"the vision tower's hidden_act is {visual.config.hidden_act!r}, not {_GELU!r}"
    for name, module, plain in _parts(visual):
        if plain is nn.Linear:
            if (why := why_projection(module, dtype, biased=True)) is not None:
                return f"{name} is {why}"
            continue
        found = why_module(module, plain)
        if found is not None:
            return f"{name} is a {found}"
        odd = [parameter.dtype for parameter in plain_parameters(module) if parameter.dtype != dtype]
        if odd:
            return f"{name} is {odd[0]}, the embedding {dtype}"
    return None


def _parts(visual: Any) -> Iterator[tuple[str, Any, type[nn.Module]]]:
    """Every module whose weights are read or whose work is done otherwise, and the class it must be of."""
    from transformers.activations import ACT2FN
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

    gelu = type(ACT2FN[_GELU])
    yield "visual.patch_embed", visual.patch_embed, qwen.Qwen3VLVisionPatchEmbed
    yield "visual.patch_embed.proj", visual.patch_embed.proj, nn.Conv3d
    yield "visual.pos_embed", visual.pos_embed, nn.Embedding
    for index, block in enumerate(visual.blocks):
        name, mlp = f"visual.blocks.{index}", block.mlp
        yield f"{name}.norm1", block.norm1, nn.LayerNorm
        yield f"{name}.attn.qkv", block.attn.qkv, nn.Linear
        yield f"{name}.attn.proj", block.attn.proj, nn.Linear
        yield f"{name}.norm2", block.norm2, nn.LayerNorm
        yield f"{name}.mlp", mlp, qwen.Qwen3VLVisionMLP
        yield f"{name}.mlp.linear_fc1", mlp.linear_fc1, nn.Linear
        yield f"{name}.mlp.act_fn", mlp.act_fn, gelu
        yield f"{name}.mlp.linear_fc2", mlp.linear_fc2, nn.Linear
    levels = enumerate(visual.deepstack_merger_list)
    mergers = [("visual.merger", visual.merger)]
    mergers += [(f"visual.deepstack_merger_list.{index}", merger) for index, merger in levels]
    for name, merger in mergers:
        yield name, merger, qwen.Qwen3VLVisionPatchMerger
        yield f"{name}.norm", merger.norm, nn.LayerNorm
        yield f"{name}.linear_fc1", merger.linear_fc1, nn.Linear
        yield f"{name}.act_fn", merger.act_fn, nn.GELU
        yield f"{name}.linear_fc2", merger.linear_fc2, nn.Linear
