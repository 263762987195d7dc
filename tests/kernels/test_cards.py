"""The kernels' blocks against the shared memory of cards that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

product = pytest.importorskip("alpamayo_dflash.kernels.product")
attention = pytest.importorskip("alpamayo_dflash.kernels.attention")
waypoints = pytest.importorskip("alpamayo_dflash.kernels.waypoints")
ROOT = Path(__file__).parents[2]
CARDS = {"H100 and H200": (90, 232_448), "A100": (80, 166_912), "GeForce RTX 4090": (89, 101_376)}


@pytest.fixture(scope="module")
def compiled():
    """By card, the shared memory that each kernel takes; one process compiles for all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.kernels.compile_for_cards",
            *(f"{capability}:{available}" for capability, available in CARDS.values()),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {
        card: {name: int(size) for of, name, size in lines if int(of) == capability}
        for card, (capability, _) in CARDS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_blocks_fit(card, compiled):
    taken, (_, available) = compiled[card], CARDS[card]
    assert len(taken) == 4 + len(attention._PLANS) + len(waypoints.PLANS) + 2 + 3
    assert max(taken.values()) <= available, taken
    # The loops' loads are in flight together; otherwise nothing was measured.
    assert max(taken.values()) > available // 2


@pytest.mark.parametrize("available", [232_448, 166_912, 101_376, 49_152])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_plans_keep_to_what_there_is(available, dim):
    for plan in (*attention._PLANS.values(), *waypoints.PLANS.values()):
        fitted = plan.fitted(dim, available)
        assert 2 * fitted.rows * dim + 4 * fitted.keys * dim * fitted.stages <= available
        assert fitted.stages >= 2 and fitted.keys >= 16 and fitted.rows >= 16


def test_the_largest_cards_take_the_plans_as_they_are():
    for plans in (attention._PLANS, waypoints.PLANS):
        assert all(plan.fitted(128, 232_448) == plan for plan in plans.values())
    assert product._NARROW.staged(64, False, 232_448) == product._NARROW.stages
    assert product._WIDE_GATED.staged(64, True, 232_448) == product._WIDE_GATED.stages
