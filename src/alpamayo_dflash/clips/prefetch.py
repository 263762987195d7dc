"""Reading windows ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from alpamayo_dflash.clips.source import ClipError, ClipSource
from alpamayo_dflash.clips.window import DEFAULT_T0_US, Window

_AHEAD_PER_WORKER = 2


def iterate_windows(
    source: ClipSource, clip_ids: Sequence[str], t0_us: int = DEFAULT_T0_US, workers: int = 1
) -> Iterator[tuple[str, Window | ClipError]]:
    """Read windows in the order given, a few ahead of what has been taken, in threads.

    A clip that cannot be read comes as its error, so that the caller can record and count it.

    Args:
        source: the dataset.
        clip_ids: the clips.
        t0_us: the moment of each, microseconds.
        workers: reading threads.

    Raises:
        ValueError: the list is empty, or there is no worker.
    """
    if not clip_ids:
        raise ValueError("the list of clips is empty")
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    return _windows(source, clip_ids, t0_us, workers)


def _windows(
    source: ClipSource, clip_ids: Sequence[str], t0_us: int, workers: int
) -> Iterator[tuple[str, Window | ClipError]]:
    def read(clip_id: str) -> Window | ClipError:
        try:
            return source.window(clip_id, t0_us)
        except ClipError as error:
            return error

    pool = ThreadPoolExecutor(workers, thread_name_prefix="clips")
    waiting: deque[tuple[str, Future[Window | ClipError]]] = deque()
    remaining = iter(clip_ids)
    try:
        waiting.extend((c, pool.submit(read, c)) for c in islice(remaining, workers * _AHEAD_PER_WORKER))
        while waiting:
            clip_id, result = waiting.popleft()
            window = result.result()
            waiting.extend((c, pool.submit(read, c)) for c in islice(remaining, 1))
            yield clip_id, window
    finally:
        pool.shutdown(cancel_futures=True)
