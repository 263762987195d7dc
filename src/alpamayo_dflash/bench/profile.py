"""What happens inside one speculative round, by PyTorch's profiler."""

from __future__ import annotations

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
        sample, most = Sample(0), round_.shape.per_sample - round_.block
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
    host: dict[str, int] = {}
    device: dict[str, list[float]] = {}
    for event in recorded.events():
        if event.device_type.name == "CUDA":
            device.setdefault(short_name(event.name), []).append(event.device_time)
        elif event.name.startswith("cu"):
            host[event.name] = host.get(event.name, 0) + 1
    table = [
        {"name": name, "launches": len(times) / _ROUNDS, "ms": round(sum(times) / _ROUNDS / 1e3, 4)}
        for name, times in sorted(device.items(), key=lambda item: -sum(item[1]))
    ]
    return {"rounds": _ROUNDS, "allocations": allocations, "host_calls": host, "device_per_round": table}


def short_name(name: str) -> str:
    """A kernel's name without its arguments and namespaces."""
    bare = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return bare.partition("<")[0].partition("(")[0].rpartition("::")[2].strip()[:60]
