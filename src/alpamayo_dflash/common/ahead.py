"""Work done in threads: a few items ahead of its use, or after who hands it over has gone on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def read_ahead(items: Iterable[_Item], make: Callable[[_Item], _Made], threads: int) -> Iterator[_Made]:
    """Yield make(item) in order, made by threads some items ahead; in line with no threads."""
    if threads == 0:
        yield from map(make, items)
        return
    waiting: deque[Future[_Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Behind:
    """Does work in one thread, piece after piece in the order given, while the caller goes on.

    After a piece that raised, none is begun; the caller gets its error with the next piece, or on leaving.
    Use it as a context manager: leaving waits for all that was given, on an error's way out too.

    Args:
        most: pieces that may wait; who gives one more waits.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1)
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._raise()

    def __call__(self, work: Callable[[], object]) -> None:
        """Give a piece of work; raises what an earlier one raised."""
        while self._waiting and (len(self._waiting) >= self._most or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._raise()
        self._waiting.append(self._pool.submit(self._do, work))

    def _do(self, work: Callable[[], object]) -> None:
        if self._error is None:
            try:
                work()
            except BaseException as error:
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
