"""One caller at a time, for whatever owns buffers that calls write over."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turn:
    """Lets one thread in; others wait until it is out.

    Args:
        owner: whose buffers these are, for the message.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._lock = threading.Lock()
        self._holder: int | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn, and have it while the context lasts.

        Raises:
            RuntimeError: this thread has it already: a call from inside a call would write over its buffers.
        """
        if self._holder == threading.get_ident():
            raise RuntimeError(
                f"{self._owner} is at work on a call of this thread, and was called from inside it (from an "
                "observer or proposer); make another for that"
            )
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None
