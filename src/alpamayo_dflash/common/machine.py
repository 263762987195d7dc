"""The machine: its devices, their names and clocks, and the memory that a process takes on host and GPU."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self, TypeVar

import torch

from alpamayo_dflash.common.artefacts import answer_of

_GIB = 2**30
_HOPPER = (9, 0)
_GROUP = Path("/sys/fs/cgroup")
_SAMPLE_EVERY_S = 0.005
_T = TypeVar("_T")


class Clock:
    """The host's clock, read once a device has done its work: a GPU is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now_ms(self) -> float:
        """Milliseconds from some moment on; only differences mean something."""
        if self._device.type == "cuda":
            # Of the whole device it would end another thread's capture of a graph.
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter() * 1e3


def is_hopper(device: torch.device) -> bool:
    """Whether a device is a GPU of NVIDIA's Hopper generation (H100, H200) or a later one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER


class Stopwatch:
    """Times what a device does without waiting for it: by events on its stream, on a CPU by the clock.

    A moment is marked when the work enqueued before it is done. A part is only what is enqueued inside it, so
    that gaps between parts belong to none. Reading a time waits for its end.

    Args:
        device: whose current stream the work is enqueued on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: dict[str, list[tuple[Moment, Moment]]] = {}

    def moment(self) -> Moment:
        """Mark this place in the device's work."""
        if self._device.type != "cuda":
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is enqueued inside, on top of the part's time so far."""
        start = self.moment()
        yield
        self._parts.setdefault(name, []).append((start, self.moment()))

    def parts_ms(self) -> dict[str, float]:
        """Milliseconds of each part."""
        return {name: sum(found) for name, found in self.each_ms().items()}

    def each_ms(self) -> dict[str, list[float]]:
        """Milliseconds of each part, time after time."""
        return {name: [between_ms(*each) for each in found] for name, found in self._parts.items()}


Moment = torch.cuda.Event | float
"""A place in a device's work; on a CPU its time in milliseconds."""


def between_ms(start: Moment, end: Moment) -> float:
    """Milliseconds between two moments of one stopwatch; waits for the second."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. From the CPU to a GPU it goes through pinned memory: the host does not wait."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Download:
    """Brings tensors to the host from another thread than the one whose work they are.

    A GPU's copies go over a stream of their own, so that the work goes on meanwhile.

    Args:
        device: where the tensors lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """The end of what has been enqueued so far: the thread that enqueues calls it, on its stream."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    def __call__(
        self, tensors: Mapping[str, torch.Tensor], ready: torch.cuda.Event | None
    ) -> dict[str, torch.Tensor]:
        """The tensors on the host; waits for the mark and for the copies."""
        if self._stream is None or ready is None:
            return dict(tensors)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            return {name: tensor.to("cpu") for name, tensor in tensors.items()}


def device_index(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Int64 on a device, for which the host does not wait."""
    return uploaded(torch.tensor(values, dtype=torch.int64, device="cpu"), device)


def host_memory() -> dict[str, int]:
    """This process's resident memory in bytes, from /proc (Linux).

    Returns:
        `VmRSS` now, `VmHWM` the highest so far, `RssAnon` its own, `RssFile` mapped files (pages that the
        system may take back at any time), `RssShmem` shared.
    """
    wanted = ("VmRSS", "VmHWM", "RssAnon", "RssFile", "RssShmem")
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in wanted:
            found[name] = int(rest.split()[0]) * 1024
    return found


class HostWatch:
    """Watches this process's resident memory while it is open.

    The kernel's own high-water mark is the peak; where it may be set back it is, on opening. The split into
    own and mapped memory is sampled by a thread.

    Attributes:
        before: `host_memory` on opening.
        after: on closing.
        peak_bytes: the highest resident memory.
        peak_was_reset: whether the mark was set back; if not, the peak may be an older one's.
        split_peaks: the highest sampled value of each kind, bytes.
    """

    def __init__(self) -> None:
        self.before: dict[str, int] = {}
        self.after: dict[str, int] = {}
        self.peak_bytes = 0
        self.peak_was_reset = False
        self.split_peaks: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        """Set the mark back and begin."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.peak_was_reset = True
        except OSError:
            self.peak_was_reset = False  # some containers forbid it; the results record that
        self.before = host_memory()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Read the mark and stop."""
        self._stop.set()
        self._thread.join()
        self.after = host_memory()
        self._keep(self.after)
        self.peak_bytes = self.after["VmHWM"]

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_EVERY_S):
            self._keep(host_memory())

    def _keep(self, memory: dict[str, int]) -> None:
        for name, value in memory.items():
            self.split_peaks[name] = max(value, self.split_peaks.get(name, 0))


class GpuMemory:
    """The allocator's figures in bytes; on a CPU all of them are 0.

    Making one brings CUDA up, so that its own memory counts as there before the load.
    """

    def __init__(self, device: torch.device) -> None:
        self.used = device.type == "cuda"
        self._device = device
        self._reserved = 0
        if self.used:
            torch.ones(8, device=device).sum().item()
            torch.cuda.reset_peak_memory_stats(device)

    def allocated(self) -> int:
        """What tensors hold now."""
        return torch.cuda.memory_allocated(self._device) if self.used else 0

    def reserved(self) -> int:
        """The most that the allocator has taken from the device."""
        if not self.used:
            return 0
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self._device))
        return self._reserved

    def phase_peak(self) -> int:
        """The most that tensors held since the last call."""
        if not self.used:
            return 0
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        self.reserved()  # the reset forgets that peak too
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak

    def context(self) -> int:
        """What the device holds beside the allocator's: the context, kernels, and other processes."""
        if not self.used:
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)

    def above(self, call: Callable[[], _T]) -> tuple[_T, int]:
        """A call's value and the most that it held beyond what was held before."""
        self.phase_peak()
        before = self.allocated()
        value = call()
        return value, self.phase_peak() - before


def describe_gpu(device: torch.device) -> dict[str, str | None]:
    """A GPU's name and what drives it; the driver is None where its tool is missing or fails."""
    driver = answer_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": torch.cuda.get_device_name(device),
        "driver": driver and driver.split()[0],
        "cuda": torch.version.cuda,
    }


def gib(size: int) -> float:
    """Bytes as GiB, to four decimals."""
    return round(size / _GIB, 4)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take: of a GPU, or of the host within its control group's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemAvailable:")
    )
    limit, used = (_GROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text(encoding="ascii").strip()) != "max":
        available = min(available, int(most) - int(used.read_text(encoding="ascii")))
    return max(0, available)


def check_memory(size: int, device: torch.device, what: str, remedy: str) -> None:
    """Make sure that something fits before it is taken.

    Args:
        size: bytes.
        device: where.
        what: it is, for the message.
        remedy: what to ask for instead.

    Raises:
        ValueError: it does not fit; the message has both sizes.
    """
    free = free_memory(device)
    if size > free:
        raise ValueError(
            f"{what} takes {size / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB are free on {device}; "
            f"ask for {remedy}"
        )


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


def make_current(device: torch.device) -> None:
    """Make a GPU that is named by its number the current one for good; plain cuda is what it is already."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: kernels, streams and graphs belong to that, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
