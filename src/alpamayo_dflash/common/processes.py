"""The processes of a training run: alone, or several under torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from alpamayo_dflash.common.machine import check_device, make_current
from alpamayo_dflash.common.ranks import own_device, share_of

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: its number.
        world_size: how many there are.
        device: its torch device.
    """

    rank: int
    world_size: int
    device: str

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and shows progress."""
        return self.rank == 0

    def add(self, values: Tensor) -> Tensor:
        """The sum of `values` over the processes, on every one of them."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def share(self, value: _T) -> _T:
        """The first process's value, on every one of them."""
        values = [value]
        if self.world_size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            distributed.barrier()


@contextlib.contextmanager
def join(device: str) -> Iterator[Processes]:
    """Take this process's place among those that torchrun started; alone without torchrun.

    Args:
        device: torch device; plain "cuda" means the local rank's GPU under torchrun.
    """
    rank, world_size = share_of(None, None, os.environ)
    device = str(check_device(own_device(device)))
    make_current(torch.device(device))
    if world_size == 1:
        yield Processes(rank, world_size, device)
        return
    if device.startswith("cuda"):
        # With the device, NCCL knows it before the first barrier and does not guess one.
        distributed.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        distributed.init_process_group("gloo")
    try:
        yield Processes(rank, world_size, device)
    finally:
        distributed.destroy_process_group()
