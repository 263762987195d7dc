"""What a card allows a kernel: shared memory, and how many stages of loads fit into it."""

from __future__ import annotations

import functools

import torch
from triton.runtime import driver


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; unbounded in Triton's interpreter."""
    if device.type != "cuda":
        return 2**31
    properties = driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def fitting_stages(wanted: int, stage_bytes: int, fixed_bytes: int, available: int) -> int:
    """How many stages of a loop's loads fit into shared memory, up to those wanted; 0 if not even one."""
    return max(0, min(wanted, (available - fixed_bytes) // stage_bytes))
