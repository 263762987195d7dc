"""Batches on the device that trains: made by threads, and copied while the step before runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch

from alpamayo_dflash.common.ahead import read_ahead
from alpamayo_dflash.train.data import BlockBatch, BlockData, Blocks


def batches_on(device: str, data: BlockData, parts: Iterable[Blocks], threads: int) -> Iterator[BlockBatch]:
    """The batches of some lists of blocks, in order.

    For a GPU they are made ahead in pinned memory, and one is copied while the one before is in use, on a
    stream of its own. On a CPU threads only help where the data is read from the disk.

    Args:
        device: torch device.
        data: the blocks' responses.
        parts: the blocks of each batch.
        threads: that make batches ahead; 0 makes them in line.
    """
    if not device.startswith("cuda"):
        for batch in read_ahead(parts, data.batch, 0 if data.fits else threads):
            yield batch.to(device)
        return
    yield from _copied_ahead(read_ahead(parts, lambda blocks: data.batch(blocks).pinned(), threads), device)


def _copied_ahead(pinned: Iterable[BlockBatch], device: str) -> Iterator[BlockBatch]:
    """Each batch on the GPU, with the next one's copies started before it is handed out."""
    stream = torch.cuda.Stream(device)
    copies: deque[tuple[BlockBatch, torch.cuda.Event]] = deque()
    for batch in pinned:
        with torch.cuda.stream(stream):
            copies.append((batch.to(device), stream.record_event()))
        if len(copies) > 1:
            yield _arrived(*copies.popleft())
    while copies:
        yield _arrived(*copies.popleft())


def _arrived(batch: BlockBatch, copied: torch.cuda.Event) -> BlockBatch:
    """The batch for use on the current stream, which waits for its copies; the host does not."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in batch.tensors().values():
        tensor.record_stream(current)  # else its memory could be taken while the step still reads it
    return batch
