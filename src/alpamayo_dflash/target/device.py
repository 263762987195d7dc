"""Devices by name, and which of several is the current one."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def check_device(name: torch.device | str) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: the name is no device's, or this machine has none such.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used here: {reason}") from None
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: kernels, streams and graphs belong to that, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
