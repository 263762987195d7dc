"""CUDA graphs: the one place that knows how they are made."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


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
