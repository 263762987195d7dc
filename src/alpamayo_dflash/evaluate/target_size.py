"""A target of real size on this machine: time to load, memory of host and GPU, one window to a trajectory.

`write-random-target` writes a checkpoint with random weights, `measure-target` loads one. The second is meant
to run in a process of its own, as the command line does.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from alpamayo_dflash.target.random_config import RandomCheckpointConfig, RandomSize

if TYPE_CHECKING:
    import torch

    from alpamayo_dflash.clips import Window
    from alpamayo_dflash.decode import Result, SpeculativeDecoder
    from alpamayo_dflash.target import Alpamayo, Prompt

_GIB = 2**30
# What a GeForce card sold as 24 GB reports: 24,564 MiB.
_CARD_BYTES = 24_564 * 2**20
_HOST_OVER_SHARD = 1.2
# Below this a shard is small beside the tokenizer and the modules themselves, and the ratio says nothing.
_RATIO_FROM_GIB = 1.0
_SAMPLE_EVERY_S = 0.005
_FRAME = (1080, 1920, 3)
_SPEED_MPS = 10.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class WriteRandomTargetConfig:
    """Write a checkpoint with random weights in the official layout.

    Attributes:
        out: folder of the checkpoint.
        size: r1-10b has the R1 release's sizes (22 GB on disk); medium (1.3 GB) and small (2 MB) its layout.
        seed: of the weights.
        device: where they are drawn; a GPU is much faster, and gives other values than the CPU.
    """

    out: Path
    size: RandomSize = "r1-10b"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the ranges."""
        _ = self.checkpoint

    @property
    def checkpoint(self) -> RandomCheckpointConfig:
        """The checkpoint's own config."""
        return RandomCheckpointConfig(self.size, self.seed, self.device)


@dataclass(frozen=True)
class MeasureTargetConfig:
    """Measure a target's loading and memory, and run one window of noise images to a trajectory.

    Attributes:
        target: folder of the checkpoint.
        device: torch device.
        dtype: of the weights; the checkpoint's own where it is left out (float32 on a CPU).
        max_tokens: limit of generated tokens.
        prompt_capacity: the longest prompt that the cache holds, tokens.
        seed: of the images and of sampling.
        cold: ask the system to forget the weight files first, so that they are read from the disk.
        out: the JSON file to write.
    """

    target: Path
    device: str = "cuda"
    dtype: Literal["float32", "bfloat16"] | None = None
    max_tokens: int = 32
    prompt_capacity: int = 4096
    seed: int = 0
    cold: bool = False
    out: Path = Path("docs/results/target_h200.json")

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("max_tokens", "prompt_capacity"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def write(config: WriteRandomTargetConfig) -> dict[str, Any]:
    """Write the checkpoint; a finished one is left as it is.

    Raises:
        ValueError: the folder holds another checkpoint, or the device is not there.
    """
    from alpamayo_dflash.target.random_checkpoint import write_random_checkpoint

    started = time.time()
    summary = write_random_checkpoint(config.out, config.checkpoint)
    return summary | {"write_s": round(time.time() - started, 3), "out": str(config.out)}


def measure(config: MeasureTargetConfig) -> dict[str, Any]:
    """Load, run one window, write the figures; `passed` says whether they lie in their bounds.

    The bounds: the trajectory is finite; on a GPU, loading takes less than 1.2 times the largest shard of
    host memory (for shards from 1 GiB on), and all that was reserved, with the GPU's context, fits a card of
    24 GB (24,564 MiB).

    Raises:
        ValueError: the checkpoint is missing or does not load, or the device is not there.
    """
    from alpamayo_dflash.artefacts import folder_hash, provenance, write_json
    from alpamayo_dflash.decode import DecodeConfig, SpeculativeDecoder
    from alpamayo_dflash.target import Alpamayo
    from alpamayo_dflash.target.device import check_device

    started = time.time()
    device = check_device(config.device)
    shards = _shards(config.target)
    gpu = _Gpu(device)
    if config.cold:
        _forget(shards)
    with HostWatch() as host:
        start = time.perf_counter()
        target = Alpamayo.from_pretrained(
            config.target, device=device, dtype=config.dtype, local_files_only=True
        )
        gpu.wait()
        load_s = time.perf_counter() - start
    weights = _weight_bytes(target)
    after_load, load_peak = gpu.allocated(), gpu.phase_peak()
    decoder = SpeculativeDecoder(target, None, DecodeConfig(prompt_capacity=config.prompt_capacity))
    window = noise_window(config.seed)
    first = _generate(decoder, window, config)
    # Of one whole run; what follows looks at the stages one by one.
    run = {"peak": max(load_peak, gpu.phase_peak()), "reserved": gpu.reserved(), "context": gpu.context()}
    warm = _generate(decoder, window, config)
    stages = _stages(decoder, target.prompt(window), config, gpu)
    largest = max(shard.stat().st_size for shard in shards)
    figures = {
        "load_s": round(load_s, 3),
        **_host_figures(host, weights if device.type == "cpu" else 0, largest),
        "weights_gib": _gib(weights),
        "gpu_peak_gib": _gib(run["peak"]) if gpu.used else None,
        "gpu": None,
        **_run_figures(target, decoder, first, warm),
    }
    if gpu.used:
        memory = _gpu_figures(run, after_load, load_peak, stages, _cache_bytes(decoder))
        figures["gpu"] = gpu.describe() | memory
    figures["passed"] = passed(figures)
    made = provenance(
        config=config,
        parents={"target": folder_hash(config.target)},
        seed=config.seed,
        device=config.device,
        started=started,
    )
    write_json(config.out, figures | {"provenance": made})
    return figures | {"out": str(config.out)}


def passed(figures: dict[str, Any]) -> bool:
    """Whether the figures lie in the bounds that `measure` names."""
    if not figures["trajectory"]["finite"]:
        return False
    if figures["gpu"] is None:
        return True
    shard_counts = figures["largest_shard_gib"] >= _RATIO_FROM_GIB
    if shard_counts and figures["host_over_shard"] >= _HOST_OVER_SHARD:
        return False
    return bool(figures["gpu"]["fits_24gb"])


def noise_window(seed: int) -> Window:
    """Sixteen 1080×1920 images of noise, and a straight drive at 10 m/s."""
    import numpy as np

    from alpamayo_dflash.clips.window import (
        DEFAULT_CAMERAS,
        DEFAULT_T0_US,
        FRAMES_PER_CAMERA,
        HISTORY_POINTS,
        STEP_S,
        Window,
    )

    shape = (len(DEFAULT_CAMERAS), FRAMES_PER_CAMERA, *_FRAME)
    xyz = np.zeros((HISTORY_POINTS, 3), dtype=np.float32)
    xyz[:, 0] = np.arange(1 - HISTORY_POINTS, 1) * (STEP_S * _SPEED_MPS)
    return Window(
        clip_id=f"noise{seed}",
        t0_us=DEFAULT_T0_US,
        cameras=DEFAULT_CAMERAS,
        frames=np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8),
        ego_history_xyz=xyz,
        ego_history_rot=np.broadcast_to(np.eye(3, dtype=np.float32), (HISTORY_POINTS, 3, 3)).copy(),
    )


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
            self.peak_was_reset = False  # some containers forbid it; the results say so
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


class _Gpu:
    """The allocator's figures in bytes; on a CPU all of them are 0.

    Making one brings CUDA up, so that its own memory counts as there before the load.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.used = device.type == "cuda"
        self._device = device
        self._cuda = torch.cuda
        self._reserved = 0
        if self.used:
            torch.ones(8, device=device).sum().item()
            torch.cuda.reset_peak_memory_stats(device)

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.used:
            self._cuda.synchronize(self._device)

    def allocated(self) -> int:
        """What tensors hold now."""
        return self._cuda.memory_allocated(self._device) if self.used else 0

    def reserved(self) -> int:
        """The most that the allocator has taken from the device."""
        if not self.used:
            return 0
        self._reserved = max(self._reserved, self._cuda.max_memory_reserved(self._device))
        return self._reserved

    def phase_peak(self) -> int:
        """The most that tensors held since the last call."""
        if not self.used:
            return 0
        self.wait()
        peak = self._cuda.max_memory_allocated(self._device)
        self.reserved()  # the reset forgets that peak too
        self._cuda.reset_peak_memory_stats(self._device)
        return peak

    def context(self) -> int:
        """What the device holds beside the allocator's: the context, kernels, and other processes."""
        if not self.used:
            return 0
        free, total = self._cuda.mem_get_info(self._device)
        return total - free - self._cuda.memory_reserved(self._device)

    def above(self, call: Callable[[], _T]) -> tuple[_T, int]:
        """A call's value and the most that it held beyond what was held before."""
        self.phase_peak()
        before = self.allocated()
        value = call()
        return value, self.phase_peak() - before

    def describe(self) -> dict[str, Any]:
        """The device and what drives it."""
        import torch

        properties = self._cuda.get_device_properties(self._device)
        return {
            "name": properties.name,
            "total_gib": _gib(properties.total_memory),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }


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
    return decoder.generate(window, seed=config.seed, max_new_tokens=config.max_tokens)


def _stages(
    decoder: SpeculativeDecoder, prompt: Prompt, config: MeasureTargetConfig, gpu: _Gpu
) -> dict[str, int]:
    """What each stage holds beyond weights and cache, bytes.

    The action expert is looked at behind a text of one token, whose decoding has no verify pass with logits.
    """
    prefilled, prefill = gpu.above(lambda: decoder.prefill(prompt))
    tokens = config.max_tokens
    _, decode = gpu.above(lambda: decoder.generate(prefilled, max_new_tokens=tokens, trajectories=False))
    _, action = gpu.above(lambda: decoder.generate(prefilled, max_new_tokens=1))
    return {"vision_and_prefill": prefill, "decode": decode, "action": action}


def _host_figures(host: HostWatch, weights_on_host: int, largest_shard: int) -> dict[str, Any]:
    """Resident memory of the load; weights that lie on the host to stay are not the load's."""
    load = host.peak_bytes - host.before["VmRSS"] - weights_on_host
    # The kernel counts kibibytes on Linux.
    ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "host_before_gib": _gib(host.before["VmRSS"]),
        "host_peak_gib": _gib(host.peak_bytes),
        "host_peak_was_reset": host.peak_was_reset,
        "host_process_peak_gib": _gib(ever),
        "host_load_gib": _gib(load),
        "largest_shard_gib": _gib(largest_shard),
        "host_over_shard": round(load / largest_shard, 4),
        "host_split_gib": {
            label: {name: _gib(memory[name]) for name in ("RssAnon", "RssFile", "RssShmem")}
            for label, memory in (("before", host.before), ("peak", host.split_peaks), ("after", host.after))
        },
    }


def _gpu_figures(
    run: dict[str, int], after_load: int, load_peak: int, stages: dict[str, int], cache: int
) -> dict[str, Any]:
    needed = run["reserved"] + run["context"]
    return {
        "after_load_gib": _gib(after_load),
        "load_peak_gib": _gib(load_peak),
        "cache_gib": _gib(cache),
        "activations_gib": {name: _gib(value) for name, value in stages.items()},
        "reserved_gib": _gib(run["reserved"]),
        "context_gib": _gib(run["context"]),
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


def driver_version() -> str | None:
    """The GPU driver's version; None where its tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        answer = subprocess.run(  # noqa: S603
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def _gib(size: int) -> float:
    return round(size / _GIB, 4)
