"""The wheel, installed by itself, holds all that decoding on the tiny target takes."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import alpamayo_dflash
from alpamayo_dflash.bench.cards import cards_path
from alpamayo_dflash.common.extras import DISTRIBUTIONS, EXTRAS
from tests.helpers import frozen_texts

ROOT = Path(__file__).parents[2]
CLIPS = 2
DECODE = """
import json, sys
import torch
import alpamayo_dflash
from alpamayo_dflash import Alpamayo, SpeculativeDecoder
from alpamayo_dflash.standins.validate import held_out

clips, seed, request = json.loads(sys.argv[1])
torch.set_num_threads(1)
decoder = SpeculativeDecoder(Alpamayo.from_pretrained("tiny", dtype="float32"))
results = [decoder.generate(window, trajectories=False, **request) for window, _ in held_out(clips, seed)]
texts = [result.token_ids for result in results]
print(json.dumps({"file": alpamayo_dflash.__file__, "texts": texts}))
"""


def run(*arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment with the wheel alone; the dependencies are those of the running interpreter."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    # A path in a .pth file adds the folder, but not that folder's own .pth files: no editable checkout.
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return python, packages


def test_the_wheel_decodes_what_the_checkout_does(installed):
    python, packages = installed
    frozen = json.loads(frozen_texts.FILE.read_text())
    given = json.dumps([CLIPS, frozen["world_seed"], frozen["requests"]["greedy"]])
    found = json.loads(run(python, "-I", "-c", DECODE, given, cwd=packages.parent))
    assert Path(found["file"]).is_relative_to(packages)
    assert found["texts"] == [clip["greedy"]["token_ids"] for clip in frozen["clips"][:CLIPS]]
    assert all(found["texts"])


def test_its_command_takes_tiny(installed, tmp_path):
    python, packages = installed
    command = python.parent / "alpamayo-dflash"
    out = tmp_path / "sees.json"
    printed = run(command, "measure-tiny", "--scenes", 2, "--out", out, cwd=tmp_path)
    assert 0 <= json.loads(printed.splitlines()[-1])["held_out"]["named"] <= 1
    assert str(packages) not in out.read_text()
    assert json.loads(out.read_text())["provenance"]["config"]["checkpoint"] == "tiny"


def test_it_holds_the_cards_to_compare_with(installed):
    _, packages = installed
    shipped = packages / "alpamayo_dflash" / "bench" / "cards.json"
    assert shipped.read_bytes() == cards_path().read_bytes()


def test_it_says_what_each_extra_brings(installed):
    """Of the metadata, as pip reads them: the base has none of the extras' packages of its own."""
    _, packages = installed
    (information,) = packages.glob("alpamayo_dflash-*.dist-info")
    metadata = importlib.metadata.PathDistribution(information).metadata
    assert metadata["Version"] == alpamayo_dflash.__version__
    assert set(EXTRAS) | {"all", "dev"} == set(metadata.get_all("Provides-Extra"))
    needed = [Requirement(each) for each in metadata.get_all("Requires-Dist")]
    base = {each.name for each in needed if each.marker is None}
    assert "torch" in base
    for extra, modules in EXTRAS.items():
        brought = {each.name for each in needed if each.marker and each.marker.evaluate({"extra": extra})}
        assert brought == {DISTRIBUTIONS.get(module, module) for module in modules}
        assert not brought & base
