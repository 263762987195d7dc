"""A few of the trials of `kills.py`; `make faults` makes them all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_stages_go_on_as_if_undisturbed():
    # In a process of its own: what it forks must have no threads behind it.
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kills", "--kills", "10", "--forced-every", "40"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["random kills"] >= 10
    assert all(counts[f"forced kills of {stage}"] > 0 for stage in ("layers", "distill", "train", "evaluate"))
