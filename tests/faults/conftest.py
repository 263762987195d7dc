"""Fuzzing's trap and its counts: `ALPAMAYO_FUZZ_OUT=counts.json` keeps them, of one process (without -n)."""

import json
import os
import sys
import time
from collections import Counter

import pytest


@pytest.fixture(scope="session", autouse=True)
def _trap(tmp_path_factory):
    """A module of the trap's name can be imported, so that who imports what a file names is caught."""
    from tests.helpers.fuzzing import TRAP

    folder = tmp_path_factory.mktemp("trap")
    (folder / f"{TRAP}.py").write_text("raise SystemExit('imported')\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


_STARTED = time.time()


def pytest_sessionfinish(session):
    """Write what each reader was given and what came of it."""
    out = os.environ.get("ALPAMAYO_FUZZ_OUT")
    if not out or "tests.helpers.fuzzing" not in sys.modules:
        return
    from alpamayo_dflash.common.artefacts import git_revision, versions, write_json
    from tests.helpers.fuzzing import COUNTS, LARGE, SEED

    total = sum(COUNTS.values(), Counter())
    profile = "ALPAMAYO_FUZZ=large " if LARGE else ""
    kinds = ("inputs", "read", "refused")
    write_json(
        out,
        {
            "readers": {name: {kind: COUNTS[name][kind] for kind in kinds} for name in sorted(COUNTS)},
            "total": {kind: total[kind] for kind in kinds},
            "failed_tests": session.testsfailed,
            "seed": SEED,
            "seconds": round(time.time() - _STARTED, 1),
            "command": f"{profile}ALPAMAYO_FUZZ_SEED={SEED} pytest tests/faults/test_fuzz_*.py",
            "versions": versions() | {"hypothesis": sys.modules["hypothesis"].__version__},
            "revision": git_revision(),
        },
    )
    print(json.dumps(dict(total)))
