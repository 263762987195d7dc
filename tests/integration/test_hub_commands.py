"""Commands whose hub says nothing."""

import os
import socket
import subprocess
import sys

import pytest

from alpamayo_dflash.common.hub import STALL_VARIABLE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["clips", "--prefetch", "--chunks", "0", "--cache-dir", "none"], "tables cannot be had"),
        (["train", "--target-model", "nobody/none", "--data-dir", "a", "--output-dir", "b"], "nothing came"),
    ],
    ids=["dataset", "model"],
)
def test_a_hub_that_never_answers_ends_a_command(tmp_path, arguments, said):
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "home"),
            STALL_VARIABLE: "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "alpamayo_dflash.cli.main", *arguments],
            cwd=tmp_path,
            env={**os.environ, **settings},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
