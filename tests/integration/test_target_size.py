"""write-random-target and measure-target on the CPU, from the command line to the JSON file."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from alpamayo_dflash.bench import memory as target_size
from alpamayo_dflash.bench.config import MeasureTargetConfig
from alpamayo_dflash.bench.memory import passed
from alpamayo_dflash.cli.main import main
from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.machine import HostWatch, host_memory
from alpamayo_dflash.target.checkpoint import VLMFiles, target_identity

MIB = 2**20


def run(*arguments: object) -> dict[str, Any]:
    """A command in this process; the last line of its standard output, read."""
    out = StringIO()
    with redirect_stdout(out):
        assert main([str(each) for each in arguments]) == 0
    return json.loads(out.getvalue().splitlines()[-1])


def run_alone(*arguments: object) -> dict[str, Any]:
    """`run` in a process of its own, for figures of the whole process."""
    done = subprocess.run(
        [sys.executable, "-m", "alpamayo_dflash.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "target"
    summary = run("write-random-target", "--out", folder, "--size", "small")
    assert summary["nothing_to_do"] is False
    assert summary["shards"] == 5
    assert run("write-random-target", "--out", folder, "--size", "small")["nothing_to_do"] is True
    return folder


def test_a_random_target_is_loaded_and_measured(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "target.json"
    options = ("--device", "cpu", "--max-tokens", 6, "--cold")
    printed = run_alone("measure-target", "--target", checkpoint, "--out", out, *options)
    found = read_json(out)
    assert {name: value for name, value in found.items() if name != "provenance"} == {
        name: value for name, value in printed.items() if name != "out"
    }
    assert found["passed"] is True
    assert found["gpu"] is None
    assert found["gpu_peak_gib"] is None
    assert found["trajectory"]["shape"] == [1, 64, 3]
    assert found["trajectory"]["finite"] is True
    assert 1 <= found["tokens"] <= 6
    assert 0 < found["load_s"] < 60
    assert found["tensors"] == len(read_json(checkpoint / "model.safetensors.index.json")["weight_map"])
    assert found["host_peak_gib"] >= found["host_before_gib"] > 0.05
    assert found["host_process_peak_gib"] >= found["host_before_gib"]
    for stage in ("prefill_ms", "decode_ms", "action_ms", "total_ms"):
        assert found["timings"]["first"][stage] > 0
        assert found["timings"]["warm"][stage] > 0
    made = found["provenance"]
    assert made["parents"]["target"] == target_identity(checkpoint, VLMFiles(checkpoint / "vlm")).hash
    assert made["config"]["max_tokens"] == 6
    assert "measure-target" in made["command"]


def test_a_target_with_samples_and_a_draft(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint's memory as it is used: several samples, and an untrained draft that proposes."""
    options = ("--device", "cpu", "--max-tokens", 3, "--num-traj-samples", 2, "--draft-layers", 1)
    found = run("measure-target", "--target", checkpoint, "--out", tmp_path / "target.json", *options)
    assert found["passed"] is True
    assert found["trajectory"]["shape"] == [2, 64, 3]
    with pytest.raises(ValueError, match="draft_layers is -1"):
        MeasureTargetConfig("tiny", draft_layers=-1)


def test_no_checkpoint_and_no_device_are_bad_input(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure-target", "--target", str(tmp_path), "--device", "cpu"]) == 2
    assert "holds no safetensors files" in capsys.readouterr().err
    assert main(["measure-target", "--target", str(checkpoint), "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_tokens is 0"):
        MeasureTargetConfig(tmp_path, max_tokens=0)


def test_the_watch_sees_a_peak_that_has_gone() -> None:
    with HostWatch() as host:
        block = mmap.mmap(-1, 96 * MIB, flags=mmap.MAP_PRIVATE)
        block.write(b"x" * MIB * 96)
        block.close()
    assert host.peak_bytes - host.before["VmRSS"] >= 90 * MIB
    assert host.after["VmRSS"] - host.before["VmRSS"] < 60 * MIB
    assert host_memory()["VmHWM"] >= host.after["VmRSS"]


def test_loading_maps_no_more_than_it_was_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    """The bound on a GPU: what was read of a file does not stay in this process until the file's end."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    from alpamayo_dflash.target import checkpoint as load

    shard = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(96 * MIB, dtype=torch.bfloat16)}, shard)
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(96 * MIB, dtype=torch.bfloat16, device="meta"))
    monkeypatch.setattr(load, "_MAPPED_BYTES", 16 * MIB)
    with HostWatch() as host:
        load.load_weights(model, tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert torch.all(model.weight == 1)
    # The weights themselves, one mapping and what the calls need.
    assert host.peak_bytes - host.before["VmRSS"] < (192 + 16 + 40) * MIB
    assert host.peak_bytes - host.before["VmRSS"] >= 192 * MIB


def figures(**changes: Any) -> dict[str, Any]:
    gpu = {"fits_24gb": True}
    whole = {
        "trajectory": {"finite": True},
        "gpu": gpu,
        "largest_shard_gib": 4.2,
        "host_over_shard": 0.2,
    }
    return whole | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"trajectory": {"finite": False}}, False),
        ({"gpu": {"fits_24gb": False}}, False),
        ({"host_over_shard": 1.2}, False),
        ({"host_over_shard": 40.0, "largest_shard_gib": 0.001}, True),
        ({"host_over_shard": 40.0, "gpu": None}, True),
    ],
)
def test_the_bounds(changes: dict[str, Any], expected: bool) -> None:
    assert passed(figures(**changes)) is expected


def test_shared_storage_counts_once(checkpoint: Path) -> None:
    import torch

    from alpamayo_dflash.target.alpamayo import Alpamayo

    target = Alpamayo.from_pretrained(checkpoint, dtype=torch.bfloat16)
    plain = sum(tensor.nbytes for tensor in (*target.parameters(), *target.buffers()))
    padding = (-target.vocab_size % 64) * target.hidden_size * 2
    assert target_size._weight_bytes(target) == plain + padding
