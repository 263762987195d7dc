"""The vision tower beside the one that was before it, the reuse of images, and the plans of the fast form."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.bench.clocks import in_turns
from alpamayo_dflash.bench.figures import medians
from alpamayo_dflash.common.machine import uploaded
from alpamayo_dflash.decode.vision import VisionReader
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.vision import encode_images
from alpamayo_dflash.target.vision_fused import FusedVision, VisionPlan, why_plain_vision

_KEPT_WINDOWS = 2
"""Windows whose images the reader keeps. Those that go round are one more: what is new is not kept."""


def vision(target: Alpamayo, prompt: Prompt, repeats: int) -> dict[str, Any]:
    """Raw timings, in turns, from pixels in the weights' dtype on the device to features.

    Args:
        target: the model.
        prompt: one window's.
        repeats: of each.

    Returns:
        `vision_ms` by form: `before` is the plain tower over all images at once, `now` what decoding takes,
        `streams_1` the fast one with a group at a time. `vision_reuse_ms`: `off` keeps no images,
        `none` keeps them and none has been seen before, `twelve` has seen three quarters of them.
        `vision_plain_because` says why the plain form runs, or is None.
    """
    prompt = ready(target, prompt)
    visual, reader, reason = target.vlm.model.visual, VisionReader(target), why_plain_vision(target)
    calls: dict[str, Callable[[], object]] = {
        "before": lambda: encode_images(visual, prompt.pixel_values, prompt.image_grid_thw, group=None),
        "now": lambda: reader(prompt),
    }
    if reason is None:
        alone = FusedVision(visual, VisionPlan(streams=1))
        calls["streams_1"] = lambda: alone(prompt.pixel_values, prompt.image_grid_thw)
    return {
        "vision_plain_because": reason,
        "vision_ms": in_turns(calls, repeats, target.device),
        "vision_reuse_ms": _reuse(target, prompt, repeats),
    }


def ready(target: Alpamayo, prompt: Prompt) -> Prompt:
    """The prompt with its pixels on the device, as the tower reads them, and its grids on the host."""
    pixels = uploaded(prompt.pixel_values, target.device).to(target.dtype)
    return replace(prompt, pixel_values=pixels, image_grid_thw=prompt.image_grid_thw.cpu())


def _reuse(target: Alpamayo, prompt: Prompt, repeats: int) -> dict[str, list[float]]:
    count = len(prompt.image_grid_thw)
    new = {"off": count, "none": count, "twelve": count - 3 * count // 4}
    prompts = windows(prompt)
    readers = {"off": VisionReader(target)}
    for arm in ("none", "twelve"):
        readers[arm] = VisionReader(target, reuse_bytes=_room(target, prompt))
    calls = {arm: _stream(reader, prompts, new[arm]) for arm, reader in readers.items()}
    for call in calls.values():
        for _ in range(_KEPT_WINDOWS + 1):
            call()
    for reader in readers.values():
        reader.hits = reader.misses = 0
    times = in_turns(calls, repeats, target.device)
    for arm, reader in readers.items():
        images = reader.hits + reader.misses
        if reader.misses * count != images * new[arm]:
            raise RuntimeError(f"reuse, {arm}: {reader.hits} of {images} images were known")
    return times


def windows(prompt: Prompt) -> list[Prompt]:
    """Prompts of a stream that goes round: the first shows images 0, 1 and so on, the next 1, 2 and so on.

    The images are noise, of the prompt's size.
    """
    count, pixels = len(prompt.image_grid_thw), prompt.pixel_values
    around = (_KEPT_WINDOWS + 1) * count
    images = torch.randn(around, *pixels.view(count, -1, pixels.shape[1]).shape[1:], device=pixels.device)
    images = images.to(pixels.dtype)
    images = torch.cat((images, images[:count]))  # so that each window is a stretch of it
    return [replace(prompt, pixel_values=images[at : at + count].flatten(0, 1)) for at in range(around)]


def _stream(reader: VisionReader, prompts: Sequence[Prompt], new: int) -> Callable[[], object]:
    """A call that reads the next window, which has so many new images."""
    places = itertools.cycle(range(0, len(prompts), new))
    return lambda: reader(prompts[next(places)])


def _room(target: Alpamayo, prompt: Prompt) -> int:
    """Bytes that the images and features of the windows take that are kept."""
    features = target.see(prompt)
    planes: list[Tensor] = [prompt.pixel_values, features.embeds, features.deepstack]
    return _KEPT_WINDOWS * sum(plane.nbytes for plane in planes)


def vision_plans(target: Alpamayo, prompt: Prompt, repeats: int) -> dict[str, Any]:
    """The whole fast tower under many plans: attentions first, then the best one's other variants.

    What is best on a card is written into `target.vision_fused.VisionPlan`.

    Args:
        target: one whose tower runs in the fast form.
        prompt: one window's.
        repeats: of each.

    Returns:
        `vision_plans_ms` by plan; one that the card or the library cannot run is left out, with a message.

    Raises:
        ValueError: the tower runs in its plain form.
    """
    reason = why_plain_vision(target)
    if reason is not None:
        raise ValueError(f"plans are of the vision tower's fast form: {reason}")
    from alpamayo_dflash.kernels.vision import LIBRARY

    prompt, times = ready(target, prompt), dict[str, list[float]]()
    plans: dict[str, VisionPlan] = {kind: VisionPlan(attention=kind) for kind in LIBRARY}
    for name, plan in plans.items():
        times |= _timed(name, target, prompt, plan, repeats=repeats)
    best = min(times, key=medians(times).__getitem__)
    others = {
        "GELU of the rounded product": replace(plans[best], gelu="rounded"),
        "one stream": replace(plans[best], streams=1),
        "three streams": replace(plans[best], streams=3),
        "once more": plans[best],
    }
    for name, plan in others.items():
        times |= _timed(f"{best}, {name}", target, prompt, plan, repeats=repeats)
    return {"vision_plans_ms": times}


def _timed(
    name: str, target: Alpamayo, prompt: Prompt, plan: VisionPlan, *, repeats: int
) -> dict[str, list[float]]:
    """A plan's times; none if the library has no such attention, or the card not the registers or memory."""
    from triton.runtime.errors import OutOfResources

    tower = FusedVision(target.vlm.model.visual, plan)

    def call() -> object:
        return tower(prompt.pixel_values, prompt.image_grid_thw)

    try:
        return in_turns({name: call}, repeats, target.device)
    except (OutOfResources, RuntimeError) as error:
        print(f"plans: {name}: {error}", file=sys.stderr)
        return {}
