"""A prompt's images as features: from the vision tower, or kept from an earlier prompt with the same image.

A window shares most of its images with the window before. An image is known if every value that the tower
reads of it is the same, bit for bit; both images are compared in full where they lie, and no hash is
trusted. As the tower's features do not depend on an image's company (`target/vision.py`), hit or miss they
are the same bits.

Shapes: N images, U merged blocks (image tokens) of an image, B blocks that are kept, I values of a block,
S sampled columns of a block, T tokens of all images, L levels of deepstack features, C text hidden.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.common.machine import device_index, uploaded
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.vision import Grid, VisionFeatures, encode_images, image_grids
from alpamayo_dflash.target.vision_fused import FusedVision, why_plain_vision
from alpamayo_dflash.target.vlm import Qwen3VLTarget

_SAMPLES = 2048
"""Values of an image that are compared with all kept ones, at least."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Encode = Callable[[Tensor, Tensor], VisionFeatures]
"""(pixel values [patches, K], image_grid_thw int64 [N, 3]) -> features, as `encode_images` gives them."""


def vision_tower(target: Qwen3VLTarget) -> Encode:
    """The fused form where it runs, else the plain one; on a GPU a warning gives the reason."""
    reason = why_plain_vision(target)
    if reason is None:
        return FusedVision(target.vlm.model.visual)
    if target.device.type == "cuda":
        warnings.warn(f"the vision tower runs in its plain, slower form: {reason}", stacklevel=2)
    return lambda pixels, grid: encode_images(target.vlm.model.visual, pixels, grid)


class VisionReader:
    """Reads prompts' images. It owns buffers, so one call at a time.

    Args:
        target: the model. Its vision tower may not change while features are kept; `forget` lets them go.
        reuse_bytes: what images and features that are kept may take; 0 keeps none. The memory is taken when
            the first prompt has been read.

    Attributes:
        hits: images whose features were known.
        misses: images that went through the tower.
    """

    def __init__(self, target: Qwen3VLTarget, *, reuse_bytes: int = 0) -> None:
        self._dtype, self._device = target.dtype, target.device
        self._encode = vision_tower(target)
        self._merged = target.patch_shape.merge**2
        self._seen = SeenImages(reuse_bytes) if reuse_bytes else None
        self.hits = self.misses = 0

    @torch.inference_mode()
    def __call__(self, prompt: Prompt) -> VisionFeatures:
        """Features of a prompt's images.

        Args:
            prompt: on the CPU or the model's (current) device. The host reads its grids.

        Raises:
            ValueError: an image's temporal grid is not 1, or the patches do not add up.
        """
        pixels = uploaded(prompt.pixel_values, self._device).to(self._dtype)
        grids = image_grids(prompt.image_grid_thw, len(pixels))
        try:
            return self._read(pixels, grids)
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Let go of all images that are kept."""
        if self._seen is not None:
            self._seen.clear()

    def _read(self, pixels: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        seen = self._seen
        if seen is None:
            features = self._encode(pixels, _thw(grids))
            self.misses += len(grids)
            return features
        images = _images(pixels, grids, self._merged)
        sources = seen.find(images)
        missed = [image for image, source in zip(images, sources, strict=True) if source is image]
        if len(missed) == len(images):
            features = new = self._encode(pixels, _thw(grids))
        else:
            new = None
            if missed:
                some = torch.cat([image.blocks_UI for image in missed]).view(-1, pixels.shape[1])
                new = self._encode(some, _thw([image.grid for image in missed]))
            features = seen.gather(sources, missed, new)
        if new is not None:
            seen.keep(missed, new, sources)
        self.misses += len(missed)
        self.hits += len(images) - len(missed)
        return features


@dataclass(frozen=True, eq=False)
class _Image:
    """An image of the prompt that is being read.

    Attributes:
        grid: in patches.
        blocks_UI: its pixels, a row a merged block.
    """

    grid: Grid
    blocks_UI: Tensor

    @property
    def tokens(self) -> int:
        """U."""
        return len(self.blocks_UI)


@dataclass(frozen=True, eq=False)
class _Kept:
    """An image that is kept.

    Attributes:
        grid: in patches.
        blocks: where its U blocks lie.
        index_U: the same on the device.
    """

    grid: Grid
    blocks: list[int]
    index_U: Tensor

    @property
    def tokens(self) -> int:
        """U."""
        return len(self.blocks)


_Source = _Image | _Kept
"""Where an image's features come from: the tower, or what is kept."""


class SeenImages:
    """Images and their features, bounded in bytes; the one used least recently makes room.

    One store of merged blocks serves images of all sizes: an image's blocks lie wherever there was room.

    Args:
        limit_bytes: what the store may take.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._images: dict[_Kept, None] = {}  # the last used at the end
        self._free: list[int] = []
        self._capacity = 0
        self._pixels_BI: Tensor | None = None
        self._features: Tensor | None = None  # [1 + L, B, C]

    def __len__(self) -> int:
        """How many images are kept."""
        return len(self._images)

    @property
    def nbytes(self) -> int:
        """What the store takes."""
        return sum(each.nbytes for each in (self._pixels_BI, self._features) if each is not None)

    def clear(self) -> None:
        """Forget all images, and give their memory back."""
        self._images.clear()
        self._pixels_BI = self._features = None

    def find(self, images: Sequence[_Image]) -> list[_Source]:
        """Where each image's features are: kept, an earlier image's here that is the same, or its own.

        The host reads one outcome for all.
        """
        sizes = [[image for image in images if image.grid == grid] for grid in {i.grid: None for i in images}]
        kept = [[each for each in reversed(self._images) if each.grid == same[0].grid] for same in sizes]
        if all(len(same) + len(known) == 1 for same, known in zip(sizes, kept, strict=True)):
            return list(images)
        found = [self._matches(same, known) for same, known in zip(sizes, kept, strict=True)]
        places = iter(torch.cat(found).tolist())
        sources: dict[_Image, _Source] = {}
        for same, known in zip(sizes, kept, strict=True):
            pool = [*known, *same]
            for image in same:
                place = next(places)
                source = image if place < 0 else pool[place]
                sources[image] = sources.get(source, source) if isinstance(source, _Image) else source
        for used in _known(sources.values()):
            self._images[used] = self._images.pop(used)
        return [sources[image] for image in images]

    def _matches(self, images: Sequence[_Image], kept: Sequence[_Kept]) -> Tensor:
        """Which of the kept ones, or then of the images before it, each image equals; −1 for none.

        Of those whose sampled values are equal, the first is compared in full. So an image may be missed that
        is there, never one be taken for another.

        Args:
            images: N of one size.
            kept: of this size.

        Returns:
            int64 [N].
        """
        own_NUI, count = torch.stack([image.blocks_UI for image in images]), len(kept)
        store_BI = self._pixels_BI
        columns_S = _columns(own_NUI.shape[2], own_NUI.shape[1], own_NUI.device)
        samples = own = own_NUI[..., columns_S].flatten(1)
        if kept and store_BI is not None:
            index_MU = torch.stack([each.index_U for each in kept])
            samples = torch.cat((store_BI[index_MU.unsqueeze(-1), columns_S].flatten(1), own))
        before = torch.ones(len(own), len(samples), dtype=torch.bool, device=own.device).tril(count - 1)
        alike = (own.unsqueeze(1) == samples).all(-1) & before
        first_N = alike.int().argmax(1)
        same_N = _same(own_NUI[(first_N - count).clamp(min=0)], own_NUI)
        if kept and store_BI is not None:
            candidates = store_BI[index_MU[first_N.clamp(max=count - 1)]]
            same_N = torch.where(first_N < count, _same(candidates, own_NUI), same_N)
        return torch.where(alike.any(1) & same_N, first_N, -1)

    def gather(
        self, sources: Sequence[_Source], missed: Sequence[_Image], new: VisionFeatures | None
    ) -> VisionFeatures:
        """A prompt's features from what is kept and what is new.

        Args:
            sources: of each image.
            missed: the images that are new.
            new: their features; None if there are none.
        """
        known = _known(sources)
        parts: list[Tensor] = []
        if new is not None:
            parts.append(torch.cat((new.embeds.unsqueeze(0), new.deepstack)))
        if known:
            assert self._features is not None
            parts.append(self._features.index_select(1, torch.cat([each.index_U for each in known])))
        rows: dict[_Source, range] = {}
        places: list[_Source] = [*missed, *known]
        start = 0
        for source in places:
            rows[source] = range(start, start + source.tokens)
            start += source.tokens
        order = [row for source in sources for row in rows[source]]
        pool = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if order != list(range(start)):
            pool = pool.index_select(1, device_index(order, pool.device))
        return VisionFeatures(pool[0], pool[1:])

    def keep(self, missed: Sequence[_Image], new: VisionFeatures, sources: Sequence[_Source]) -> None:
        """Keep new images with their features, as many as fit beside those that the prompt has used.

        Args:
            missed: the new ones, in the order of their features.
            new: their features.
            sources: of each of the prompt's images.
        """
        if self._pixels_BI is None:
            self._allocate(missed[0].blocks_UI, new)
        assert self._pixels_BI is not None and self._features is not None
        used = _known(sources)  # the last in the order, so that they do not make room
        room = self._capacity - sum(each.tokens for each in used)
        fitting = list(itertools.takewhile(lambda upto: upto <= room, _sums(missed)))
        tokens = fitting[-1] if fitting else 0
        while len(self._free) < tokens:
            oldest = next(iter(self._images))
            del self._images[oldest]
            self._free += oldest.blocks
        blocks, self._free = self._free[:tokens], self._free[tokens:]
        index = device_index(blocks, self._pixels_BI.device)
        taken = missed[: len(fitting)]
        if taken:
            self._pixels_BI.index_copy_(0, index, torch.cat([image.blocks_UI for image in taken]))
            self._features[0].index_copy_(0, index, new.embeds[:tokens])
            self._features[1:].index_copy_(1, index, new.deepstack[:, :tokens])
        for image, upto in zip(taken, fitting, strict=True):
            share = slice(upto - image.tokens, upto)
            self._images[_Kept(image.grid, blocks[share], index[share])] = None

    def _allocate(self, blocks_UI: Tensor, new: VisionFeatures) -> None:
        """Take the memory, for blocks and features like these."""
        planes, (width, device) = 1 + len(new.deepstack), (new.embeds.shape[1], blocks_UI.device)
        each = blocks_UI[0].nbytes + planes * new.embeds[0].nbytes
        self._capacity = self._limit // each
        self._free = list(range(self._capacity))
        shape = self._capacity, blocks_UI.shape[1]
        self._pixels_BI = torch.empty(shape, dtype=blocks_UI.dtype, device=device)
        self._features = torch.empty((planes, self._capacity, width), dtype=new.embeds.dtype, device=device)


def _images(pixels: Tensor, grids: Sequence[Grid], merged: int) -> list[_Image]:
    """The images of a prompt; `merged` are the patches of a block."""
    blocks = pixels.reshape(-1, merged * pixels.shape[1])
    parts = blocks.split([grid_h * grid_w // merged for grid_h, grid_w in grids])
    return [_Image(grid, part) for grid, part in zip(grids, parts, strict=True)]


def _known(sources: Iterable[_Source]) -> list[_Kept]:
    """The kept ones among sources, each once."""
    return list(dict.fromkeys(source for source in sources if isinstance(source, _Kept)))


def _thw(grids: Sequence[Grid]) -> Tensor:
    """Grids as the towers take them."""
    return torch.tensor([(1, *grid) for grid in grids], dtype=torch.int64, device="cpu")


def _sums(images: Sequence[_Image]) -> list[int]:
    """Tokens of the first image, of the first two, and so on."""
    return list(itertools.accumulate(image.tokens for image in images))


@functools.lru_cache(maxsize=16)
def _columns(width: int, blocks: int, device: torch.device) -> Tensor:
    """Which of a block's values are sampled in images of so many: always the same, without a pattern."""
    with torch.inference_mode(False):
        generator = torch.Generator(device="cpu").manual_seed(0)
        order = torch.randperm(width, generator=generator, device="cpu")
        return order[: -(-_SAMPLES // blocks)].to(device)


def _same(a_NUI: Tensor, b_NUI: Tensor) -> Tensor:
    """Whether images are the same in every bit, and have no NaN: bool [N]."""
    bits = _BITS[a_NUI.element_size()]
    return ((a_NUI == b_NUI) & (a_NUI.view(bits) == b_NUI.view(bits))).flatten(1).all(1)
