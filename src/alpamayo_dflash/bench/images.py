"""How long a window's frames take to become the vision tower's patches on the device.

The frames are sixteen of 1080 × 1920, 99.5 MB.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.bench.clocks import event_ms, graph_ms, wall_ms
from alpamayo_dflash.standins.untrained import noise_window
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.images import FrameStaging, plain_patches, upload
from alpamayo_dflash.target.images_fused import DevicePatches, why_plain_images
from alpamayo_dflash.target.prompt import resized_size

_FEW = 5
"""The most repeats of the way over the CPU, which is slow."""


def preprocess(target: Alpamayo, repeats: int) -> dict[str, Any]:
    """Time the ways from frames to patches, in milliseconds.

    Args:
        target: whose sizes, device and dtype are taken.
        repeats: of each measurement; of the way over the CPU no more than five.

    Returns:
        `frame_bytes`; `images_plain_because`, why there is only the way over the CPU, or None;
        `preprocess_ms` by way, the host's clock from frames to patches on the device: `cpu` (resized there,
        the patches copied), and with kernels `pinned` and `pageable`, after what the frames lie in. With
        kernels also `copy_ms`, the frames' copy from pinned memory alone, and `kernels_ms`, by the device's
        clock. All but the first two are lists.
    """
    frames, device = noise_window(0).frames, target.device
    order, shape = range(len(frames)), target.patch_shape
    size = resized_size(frames.shape[2], frames.shape[3], target.config, shape)

    def over_cpu() -> Tensor:
        return plain_patches(frames, order, *size, shape).to(device).to(target.dtype)

    reason = why_plain_images(device)
    found: dict[str, Any] = {
        "frame_bytes": frames.nbytes,
        "images_plain_because": reason,
        "preprocess_ms": {"cpu": wall_ms(over_cpu, min(repeats, _FEW), device)},
    }
    if reason is not None:
        return found
    device_patches, staging = DevicePatches(device, target.dtype), FrameStaging(frames.shape[:4])
    staging.frames[:] = frames
    for way, there in (("pageable", frames), ("pinned", staging.frames)):
        call = partial(device_patches, there, order, *size, shape)
        found["preprocess_ms"][way] = wall_ms(call, repeats, device)
    out = torch.empty(frames.shape, dtype=torch.uint8, device=device)
    found["copy_ms"] = event_ms(lambda: upload(staging.frames, order, out, None), repeats, device)
    found["kernels_ms"] = graph_ms(device_patches.replay, repeats, device)
    return found
