"""How things are timed: whole calls and rounds by the host's clock, graphs and parts by the device's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch

from alpamayo_dflash.common.graphs import CapturedCall
from alpamayo_dflash.common.machine import Clock, Moment, Stopwatch, between_ms
from alpamayo_dflash.decode.observer import Observer, RoundTrace

WARM = 3
"""Calls before those that count."""
_A_TURN = 5


def wall_ms(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of whole calls, launches included."""
    clock, times = Clock(device), []
    for _ in range(repeats + WARM):
        start = clock.now_ms()
        call()
        times.append(round(clock.now_ms() - start, 4))
    return times[WARM:]


def graph_ms(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of replays of a call as a CUDA graph; on a CPU of the call."""
    if device.type != "cuda":
        return wall_ms(call, repeats, device)
    return event_ms(CapturedCall(call).replay, repeats, device)


def event_ms(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of a call by events on the device's stream; on a CPU by its clock."""
    if device.type != "cuda":
        return wall_ms(call, repeats, device)
    times = []
    for _ in range(repeats + WARM):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(round(start.elapsed_time(end), 4))
    return times[WARM:]


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """`event_ms` of several calls, a few runs of each in turn, so that what drifts falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(-(-repeats // _A_TURN)):
        for name, call in calls.items():
            times[name] += event_ms(call, _A_TURN, device)
    return times


def ceilings(repeats: int, device: torch.device, dtype: torch.dtype) -> dict[str, list[float]]:
    """The rate of reading (2 GiB on a GPU), bytes a second, and of a large product, operations a second."""
    gpu = device.type == "cuda"
    size, side = (2**29, 8192) if gpu else (2**22, 512)
    values = torch.randn(size, device=device)
    read = [size * 4 / (ms / 1e3) for ms in graph_ms(values.sum, repeats, device)]
    del values
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = [2 * side**3 / (ms / 1e3) for ms in graph_ms(lambda: a @ b, repeats, device)]
    return {"read_bytes_per_s": read, "product_flop_per_s": product}


def fp8_ceiling(repeats: int, device: torch.device) -> dict[str, list[float]]:
    """The rate of a large product of e4m3 by e4m3: the library's, on a CPU the plain form's."""
    from alpamayo_dflash.kernels import fp8

    multiply = fp8.product
    if device.type == "cuda":
        from alpamayo_dflash.kernels.fp8_fused import product as multiply
    side = 8192 if device.type == "cuda" else 512
    a, b = (fp8.cast_rows(torch.randn(side, side, device=device)) for _ in range(2))
    times = graph_ms(lambda: multiply(*a, *b, torch.bfloat16), repeats, device)
    return {"fp8_product_flop_per_s": [2 * side**3 / (ms / 1e3) for ms in times]}


class PartClock:
    """Splits time into parts as it passes, by events on the device's stream; on a CPU by its clock.

    No mark waits for the device.

    Args:
        device: where the parts run.
    """

    def __init__(self, device: torch.device) -> None:
        self._watch = Stopwatch(device)
        self._marks: list[tuple[str, Moment]] = []

    def start(self) -> None:
        """Begin anew."""
        self._marks = [("", self._watch.moment())]

    def mark(self, part: str) -> None:
        """What has passed since the last mark belongs to this part, which may be marked many times."""
        self._marks.append((part, self._watch.moment()))

    def parts_ms(self) -> dict[str, float]:
        """Milliseconds of each part, in the order of their first marks; waits for the last."""
        found: dict[str, float] = {}
        for (_, before), (part, after) in pairwise(self._marks):
            found[part] = found.get(part, 0.0) + between_ms(before, after)
        return {part: round(ms, 4) for part, ms in found.items()}


class RoundClock(Observer):
    """Takes the time from each round's report to the next one's, host work included.

    A text's first round is left out: before it the draft reads the prompt's states.

    Attributes:
        times_ms: of the other rounds watched.
    """

    def __init__(self) -> None:
        self.times_ms: list[float] = []
        self._clock = Clock(torch.device("cpu"))  # a round has been read when it is reported: no waiting
        self._last = 0.0

    def on_round(self, trace: RoundTrace) -> None:
        """A report has been read: the device is idle."""
        now = self._clock.now_ms()
        if trace.index:
            self.times_ms.append(round(now - self._last, 4))
        self._last = now
