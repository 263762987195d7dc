"""A target of real size on this machine: time to load, memory of host and GPU, one window to a trajectory.

`write-random-target` writes a checkpoint with random weights, `measure-target` loads one. The second is meant
to run in a process of its own, as the command line does.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import torch

from alpamayo_dflash.bench.config import BenchConfig, MeasureTargetConfig
from alpamayo_dflash.bench.setup import random_draft
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.artefacts import provenance, write_json
from alpamayo_dflash.common.machine import Clock, GpuMemory, HostWatch, check_device, describe_gpu, gib
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import Result, SpeculativeDecoder
from alpamayo_dflash.standins.untrained import noise_window
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.target.checkpoint import checkpoint_folder
from alpamayo_dflash.target.prompt import Prompt

# What a GeForce card sold as 24 GB reports: 24,564 MiB.
_CARD_BYTES = 24_564 * 2**20
_HOST_OVER_SHARD = 1.2
# Below this a shard is small beside the tokenizer and the modules themselves, and the ratio means nothing.
_RATIO_FROM_GIB = 1.0


def run(config: MeasureTargetConfig) -> dict[str, Any]:
    """Load, run one window, write the figures; `passed` says whether they lie in their bounds.

    The bounds: the trajectory is finite; on a GPU, loading takes less than 1.2 times the largest shard of
    host memory (for shards from 1 GiB on), and all that was reserved, with the GPU's context, fits a card of
    24 GB (24,564 MiB).

    Raises:
        ValueError: the checkpoint is missing or does not load, or the device is not there.
    """
    started = time.time()
    device = check_device(config.device)
    folder = checkpoint_folder(config.target, local_files_only=True)
    shards = _shards(folder)
    gpu, clock = GpuMemory(device), Clock(device)
    if config.cold:
        _forget(shards)
    with HostWatch() as host:
        start = clock.now_ms()
        target, identity = open_target(
            str(folder),
            device=device,
            dtype=config.dtype,
            local_files_only=True,
            format_=config.target_format,
        )
        load_s = (clock.now_ms() - start) / 1e3
    weights = _weight_bytes(target)
    after_load, load_peak = gpu.allocated(), gpu.phase_peak()
    draft = None
    if config.draft_layers:
        draft = random_draft(
            target,
            config.draft_layers,
            block_size=BenchConfig.block_size,
            context_len=BenchConfig.context_len,
            draft_vocab=BenchConfig.draft_vocab,
        )
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(prompt_capacity=config.prompt_capacity))
    window = noise_window(config.seed)
    first = _generate(decoder, window, config)
    # Of one whole run; what follows looks at the stages one by one.
    whole = {"peak": max(load_peak, gpu.phase_peak()), "reserved": gpu.reserved(), "context": gpu.context()}
    warm = _generate(decoder, window, config)
    stages = _stages(decoder, target.prompt(window), config, gpu)
    largest = max(shard.stat().st_size for shard in shards)
    figures = {
        "load_s": round(load_s, 3),
        **_host_figures(host, weights if device.type == "cpu" else 0, largest),
        "weights_gib": gib(weights),
        "gpu_peak_gib": gib(whole["peak"]) if gpu.used else None,
        "gpu": None,
        **_run_figures(target, decoder, first, warm),
    }
    if gpu.used:
        memory = _gpu_figures(whole, after_load, load_peak, stages, _cache_bytes(decoder))
        total = gib(torch.cuda.get_device_properties(device).total_memory)
        figures["gpu"] = describe_gpu(device) | {"total_gib": total} | memory
    figures["passed"] = passed(figures)
    made = provenance(config, started, {"target": identity.hash})
    write_json(config.out, figures | {"provenance": made})
    return figures | {"out": str(config.out)}


def passed(figures: dict[str, Any]) -> bool:
    """Whether the figures lie in the bounds that `run` names."""
    if not figures["trajectory"]["finite"]:
        return False
    if figures["gpu"] is None:
        return True
    shard_counts = figures["largest_shard_gib"] >= _RATIO_FROM_GIB
    if shard_counts and figures["host_over_shard"] >= _HOST_OVER_SHARD:
        return False
    return bool(figures["gpu"]["fits_24gb"])


def _shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{folder}: holds no safetensors files; write-random-target makes such a folder")
    return shards


def _forget(files: list[Path]) -> None:
    """Ask the system to drop its copies of the files; those not yet on the disk are written first."""
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _generate(decoder: SpeculativeDecoder, window: Window, config: MeasureTargetConfig) -> Result:
    return decoder.generate(window, **_options(config), max_new_tokens=config.max_tokens)


def _options(config: MeasureTargetConfig) -> dict[str, Any]:
    return {"seed": config.seed, "num_traj_samples": config.num_traj_samples}


def _stages(
    decoder: SpeculativeDecoder, prompt: Prompt, config: MeasureTargetConfig, gpu: GpuMemory
) -> dict[str, int]:
    """What each stage holds beyond weights and cache, bytes.

    The action expert is looked at after a text of one token, whose decoding has no verify pass with logits.
    """
    prefilled, prefill = gpu.above(lambda: decoder.prefill(prompt))
    tokens, options = config.max_tokens, _options(config)
    _, decode = gpu.above(
        lambda: decoder.generate(prefilled, **options, max_new_tokens=tokens, trajectories=False)
    )
    _, action = gpu.above(lambda: decoder.generate(prefilled, **options, max_new_tokens=1))
    return {"vision_and_prefill": prefill, "decode": decode, "action": action}


def _host_figures(host: HostWatch, weights_on_host: int, largest_shard: int) -> dict[str, Any]:
    """Resident memory of the load; weights that lie on the host to stay are not the load's."""
    load = host.peak_bytes - host.before["VmRSS"] - weights_on_host
    # The kernel counts kibibytes on Linux.
    ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "host_before_gib": gib(host.before["VmRSS"]),
        "host_peak_gib": gib(host.peak_bytes),
        "host_peak_was_reset": host.peak_was_reset,
        "host_process_peak_gib": gib(ever),
        "host_load_gib": gib(load),
        "largest_shard_gib": gib(largest_shard),
        "host_over_shard": round(load / largest_shard, 4),
        "host_split_gib": {
            label: {name: gib(memory[name]) for name in ("RssAnon", "RssFile", "RssShmem")}
            for label, memory in (("before", host.before), ("peak", host.split_peaks), ("after", host.after))
        },
    }


def _gpu_figures(
    whole: dict[str, int], after_load: int, load_peak: int, stages: dict[str, int], cache: int
) -> dict[str, Any]:
    needed = whole["reserved"] + whole["context"]
    return {
        "after_load_gib": gib(after_load),
        "load_peak_gib": gib(load_peak),
        "cache_gib": gib(cache),
        "activations_gib": {name: gib(value) for name, value in stages.items()},
        "reserved_gib": gib(whole["reserved"]),
        "context_gib": gib(whole["context"]),
        "needed_bytes": needed,
        "fits_24gb": needed < _CARD_BYTES,
    }


def _run_figures(
    target: Alpamayo, decoder: SpeculativeDecoder, first: Result, warm: Result
) -> dict[str, Any]:
    xyz, rot = first.pred_xyz, first.pred_rot
    assert xyz is not None and rot is not None, "trajectories were asked for"
    return {
        "dtype": str(target.dtype).removeprefix("torch."),
        "target_weights": target.weight_formats,
        "tensors": len(target.state_dict()),
        "vocab_size": target.vocab_size,
        "prompt_tokens": decoder.verifier.cache.prompt_length,
        "tokens": len(first.token_ids[0]),
        "stop": str(first.stops[0]),
        "trajectory": {
            "shape": list(xyz.shape),
            "finite": bool(xyz.isfinite().all() and rot.isfinite().all()),
            "last_xyz_m": [round(float(value), 3) for value in xyz[0, -1].nan_to_num()],
        },
        "timings": {"first": first.timings, "warm": warm.timings},
    }


def _weight_bytes(target: Alpamayo) -> int:
    """Bytes of parameters and buffers; storage that several share counts once."""
    storages = {}
    for tensor in (*target.parameters(), *target.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _cache_bytes(decoder: SpeculativeDecoder) -> int:
    cache = decoder.verifier.cache
    return cache.keys.nbytes + cache.values.nbytes + cache.taps.nbytes
