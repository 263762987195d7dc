"""What happens inside one speculative round, and inside one whole window, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from alpamayo_dflash.bench.setup import Bench
from alpamayo_dflash.decode.config import Request
from alpamayo_dflash.decode.loop import Sample
from alpamayo_dflash.decode.observer import Observer

_ROUNDS = 2


def profile(bench: Bench) -> dict[str, Any] | None:
    """Allocations, the host's calls of CUDA, and the device's work by kernel; None on a CPU."""
    if bench.device.type != "cuda":
        return None
    fast, replay = bench.replaying()
    read = fast.prefill(bench.prompt)
    fast.generate(read, **bench.options(1, 0, bench.config.text_tokens))
    replay.load([[1] * bench.config.text_tokens], 0)
    round_ = next(iter(fast.device_rounds.kept.values()))
    with torch.inference_mode():
        sample, most = Sample(0), round_.shape.per_sample - round_.shape.sample_rows
        round_.open(read, Request(round_.shape.sampling, max_new_tokens=most), [sample], Observer())
        sample.tokens += round_.first([sample])
        round_.begin([sample])
        round_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            for _ in range(_ROUNDS):
                round_()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    host, table = _by_name(recorded, _ROUNDS)
    return {"rounds": _ROUNDS, "allocations": allocations, "host_calls": host, "device_per_round": table}


def profile_window(window: Callable[[], object], device: torch.device) -> dict[str, Any] | None:
    """The same of one whole window: what the host calls and waits for, what is taken from the driver.

    Memory that the allocator has kept is taken again without a call of the driver; `driver_allocations`
    counts the calls, of which there are none once every part has run.
    """
    if device.type != "cuda":
        return None
    with torch.inference_mode():
        for _ in range(2):
            window()
        before = torch.cuda.memory_stats()["num_device_alloc"]
        with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            window()
    host, table = _by_name(recorded, 1)
    return {
        "driver_allocations": torch.cuda.memory_stats()["num_device_alloc"] - before,
        "host_calls": host,
        "waits": sum(count for name, count in host.items() if "Synchronize" in name),
        "launches": sum(count for name, count in host.items() if "Launch" in name),
        "device_per_window": table,
    }


def _by_name(recorded: record, runs: int) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The host's calls of CUDA, and the device's work by kernel, a run."""
    host: dict[str, int] = {}
    device: dict[str, list[float]] = {}
    for event in recorded.events():
        if event.device_type.name == "CUDA":
            device.setdefault(short_name(event.name), []).append(event.device_time)
        elif event.name.startswith("cu"):
            host[event.name] = host.get(event.name, 0) + 1
    table = [
        {"name": name, "launches": len(times) / runs, "ms": round(sum(times) / runs / 1e3, 4)}
        for name, times in sorted(device.items(), key=lambda item: -sum(item[1]))
    ]
    return host, table


def short_name(name: str) -> str:
    """A kernel's name without its arguments and namespaces."""
    bare = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return bare.partition("<")[0].partition("(")[0].rpartition("::")[2].strip()[:60]
