"""The golden tests on sets of other shapes (`golden_writer`), run as `make golden` runs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpamayo_dflash.target.alpamayo import Alpamayo
from tests.helpers.golden_writer import SET_B, SET_C, write_set

GOLDEN_TESTS = Path(__file__).with_name("test_golden.py")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    torch.set_num_threads(1)
    for shape in (SET_B, SET_C):
        write_set(root, shape)
    return root


Golden = Callable[..., tuple[int, str]]


@pytest.fixture
def run_golden(monkeypatch: pytest.MonkeyPatch) -> Golden:
    """A session of pytest inside this one, since a process of its own would import all again.

    Returns its exit status and output. The golden tests find their sets when imported, so they are imported
    anew, and what this session had imported is put back.
    """

    def run(folder: Path, *options: str) -> tuple[int, str]:
        out = StringIO()
        with monkeypatch.context() as changes, redirect_stdout(out):
            changes.setenv("ALPAMAYO_GOLDEN", str(folder))
            for name in ("tests.conftest", f"tests.integration.{GOLDEN_TESTS.stem}"):
                changes.setitem(sys.modules, name, ModuleType(name))
                del sys.modules[name]
            status = pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", str(GOLDEN_TESTS), *options])
        return int(status), out.getvalue()

    return run


def test_sets_of_other_shapes_pass_whole(sets: Path, run_golden: Golden):
    status, printed = run_golden(sets, "-rs")
    assert status == 0, printed
    assert "passed" in printed and "skipped" not in printed


def test_the_folder_of_one_set_is_enough(sets: Path, run_golden: Golden):
    status, printed = run_golden(sets / SET_B.name, "--collect-only")
    assert status == 0, printed
    assert f"test_texts[{SET_B.name}-case1]" in printed
    assert SET_C.name not in printed


def test_a_wrong_number_is_seen(tmp_path: Path, run_golden: Golden):
    folder = write_set(tmp_path, SET_C)
    path = folder / "cases" / "left.safetensors"
    recorded = load_file(path)
    recorded["prompt_hidden"][1, 0, 0] += 1e-3
    save_file(recorded, path)
    status, printed = run_golden(tmp_path, "-k", "prompt_states")
    assert status == 1, printed
    assert "1 failed, 1 passed" in printed


@pytest.mark.parametrize("change", [{"rope_theta": 7.0}, {"hidden_act": "gelu"}, {"head_dim": 8}], ids=str)
def test_an_expert_that_does_not_fit_is_refused(change: dict[str, Any], tmp_path: Path):
    folder = write_set(tmp_path, SET_B)
    path = folder / "checkpoint" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"expert_cfg": raw["expert_cfg"] | change}))
    with pytest.raises(ValueError, match=next(iter(change))):
        Alpamayo.from_pretrained(folder / "checkpoint")
