"""The golden tests on sets of other shapes (`golden_writer`), run as `make golden` runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_writer import SET_B, SET_C, write_set
from safetensors.torch import load_file, save_file

from alpamayo_dflash.target.alpamayo import Alpamayo

GOLDEN_TESTS = Path(__file__).with_name("test_golden.py")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    torch.set_num_threads(1)
    for shape in (SET_B, SET_C):
        write_set(root, shape)
    return root


def run_golden(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ALPAMAYO_GOLDEN": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(GOLDEN_TESTS), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_sets_of_other_shapes_pass_whole(sets: Path):
    done = run_golden(sets, "-rs")
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_the_folder_of_one_set_is_enough(sets: Path):
    done = run_golden(sets / SET_B.name, "--collect-only")
    assert done.returncode == 0, done.stdout
    assert f"test_texts[{SET_B.name}-case1]" in done.stdout
    assert SET_C.name not in done.stdout


def test_a_wrong_number_is_seen(sets: Path, tmp_path: Path):
    folder = write_set(tmp_path, SET_C)
    path = folder / "cases" / "left.safetensors"
    recorded = load_file(path)
    recorded["prompt_hidden"][1, 0, 0] += 1e-3
    save_file(recorded, path)
    done = run_golden(tmp_path, "-k", "prompt_states")
    assert done.returncode == 1, done.stdout
    assert "1 failed, 1 passed" in done.stdout


@pytest.mark.parametrize("change", [{"rope_theta": 7.0}, {"hidden_act": "gelu"}, {"head_dim": 8}], ids=str)
def test_an_expert_that_does_not_fit_is_refused(change: dict[str, Any], tmp_path: Path):
    folder = write_set(tmp_path, SET_B)
    path = folder / "checkpoint" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"expert_cfg": raw["expert_cfg"] | change}))
    with pytest.raises(ValueError, match=next(iter(change))):
        Alpamayo.from_pretrained(folder / "checkpoint")
