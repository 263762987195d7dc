"""CUDA graphs: the one place that knows how they are made, and how few of them are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

_K = TypeVar("_K")
_V = TypeVar("_V")


class CapturedCall:
    """A call over tensors that never move, as a CUDA graph.

    Args:
        call: launches work on the current device and reads nothing back. It is run once, which compiles what
            is compiled and makes what is made once, and then captured.

    Raises:
        RuntimeError: the call cannot be captured.
    """

    _one_at_a_time = threading.Lock()

    def __init__(self, call: Callable[[], object]) -> None:
        with self._one_at_a_time:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Without a stream of this device's it would take the one that the process captured on first. The
            # mode lets other threads' decoders work on meanwhile.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                call()

    def replay(self) -> None:
        """Do the work again; the host does not wait for it."""
        self._graph.replay()


class Recent(dict[_K, _V]):
    """What was made for a key, the last used at the end: graphs and their buffers, of which few fit.

    Args:
        most: how many are kept; the one used longest ago makes room before another is made.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def of(self, key: _K, make: Callable[[], _V]) -> _V:
        """What is kept for a key, or what `make` gives."""
        if key in self:
            value = self.pop(key)
        else:
            while len(self) >= self._most:
                del self[next(iter(self))]
            value = make()
        self[key] = value
        return value
