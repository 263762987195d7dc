"""The command line without one package after the other, and decoding without all that it does not take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import alpamayo_dflash
from alpamayo_dflash.common.extras import DISTRIBUTIONS, EXTRAS
from tests.helpers import hidden_packages

CHECKOUT = Path(__file__).parents[2]
SOURCE = Path(alpamayo_dflash.__file__).parents[1]
HIDE = "import runpy, sys; from tests.helpers import hidden_packages; hidden_packages.hide(sys.argv[1:]); "


def interpreter(*arguments: str, given: str = "") -> str:
    """Standard output of a fresh interpreter, which finds the tests from the checkout's folder."""
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        input=given,
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def said(cases: list[tuple[str, str, list[str]]], *preloaded: str) -> Iterator[tuple[str, str]]:
    """What the command line says of each case with one package hidden; it must end with status 2."""
    given = json.dumps([[[module], arguments] for module, _, arguments in cases])
    found = json.loads(interpreter("-m", hidden_packages.__name__, *preloaded, given=given))
    for (module, extra, _), (status, text) in zip(cases, found, strict=True):
        assert status == 2, (module, text)
        assert "Traceback" not in text
        name = DISTRIBUTIONS.get(module, module)
        assert f"{name} is not installed" in text, module
        assert text.rstrip().endswith(f"pip install 'alpamayo-dflash[{extra}]'"), text
        yield module, extra


def test_a_window_of_arrays_is_decoded_with_no_extra() -> None:
    """Nor with the parser of arguments. torch itself brings jinja2."""
    hidden = {module for modules in EXTRAS.values() for module in modules} - {"jinja2"}
    decode = "runpy.run_module('tests.helpers.decode_arrays', run_name='__main__')"
    assert interpreter("-c", HIDE + decode, *sorted(hidden | {"tyro"})).strip()


def test_every_missing_package_is_named_with_what_brings_it(tmp_path: Path) -> None:
    from alpamayo_dflash.world.config import WorldConfig
    from alpamayo_dflash.world.run import run as write_world

    write_world(WorldConfig(tmp_path / "world", num_chunks=1, clips_per_chunk=1, workers=1))
    clips = ["clips", "--cache-dir", str(tmp_path / "world")]
    cases = [(module, "clips", clips) for module in ("physical_ai_av", "pandas")]
    world = ["world", "--num-chunks", "1", "--clips-per-chunk", "1", "--workers", "1", "--out"]
    writers = ("pyarrow", "scipy", "av", "PIL")
    cases += [(module, "clips", [*world, str(tmp_path / f"without-{module}")]) for module in writers]
    cases += [(module, "report", ["report", str(tmp_path)]) for module in EXTRAS["report"]]
    found = set(said(cases, "alpamayo_dflash.cli.main", "tyro", "rich.progress", "numpy"))
    assert found == {(module, extra) for extra in ("clips", "report") for module in EXTRAS[extra]}
