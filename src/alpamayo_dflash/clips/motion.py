"""The ego's motion around a moment, by the devkit's interpolation of what was recorded there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from alpamayo_dflash.clips.video import MOST_US, Times, UnsoundError
from alpamayo_dflash.clips.window import FUTURE_POINTS, HISTORY_POINTS, STEP_US
from alpamayo_dflash.common.extras import needs

# What the devkit interpolates, beside the timestamps.
MOTION = (
    *("qx", "qy", "qz", "qw", "x", "y", "z"),
    *("vx", "vy", "vz", "ax", "ay", "az", "curvature"),
)
Poses = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def poses(table: Any, t0_us: int, *, most_gap_us: int) -> tuple[Poses, Poses | None]:
    """History [16] and future [64] of the ego, as positions and rotations in the ego frame at t0.

    Args:
        table: the dataset's table of ego motion, a pandas DataFrame.
        t0_us: the moment.
        most_gap_us: see `check_gaps`.

    Returns:
        xyz float32 [n, 3] metres and rot float32 [n, 3, 3] of both; no future where the table ends before it.

    Raises:
        UnsoundError: the moment is not covered, or what covers it cannot be relied on.
    """
    with needs("clips"):
        from physical_ai_av.egomotion import EgomotionState

    stamps = stamps_of(table)
    first, last = int(stamps[0]), int(stamps[-1])
    steps = np.arange(1 - HISTORY_POINTS, FUTURE_POINTS + 1, dtype=np.int64)
    if t0_us + steps[0] * STEP_US < first or t0_us > last:
        raise UnsoundError(
            "moment", f"it covers {first} to {last} us, but t0 = {t0_us} us needs 1.5 s of history"
        )
    if t0_us + steps[-1] * STEP_US > last:
        steps = steps[:HISTORY_POINTS]
    moments = t0_us + steps * STEP_US
    check_gaps(stamps, moments, most_gap_us)
    pose = EgomotionState.from_egomotion_df(table).create_interpolator(stamps)(moments).pose
    rotation, place = pose.rotation.as_matrix(), pose.translation
    zero = HISTORY_POINTS - 1
    back = rotation[zero].T
    xyz = ((place - place[zero]) @ back.T).astype(np.float32)
    rot = (back @ rotation).astype(np.float32)
    if not (np.isfinite(xyz).all() and np.isfinite(rot).all()):
        raise UnsoundError("motion", f"it has entries that are not finite around t0 = {t0_us} us")
    history = xyz[:HISTORY_POINTS], rot[:HISTORY_POINTS]
    future = xyz[HISTORY_POINTS:], rot[HISTORY_POINTS:]
    return history, future if len(steps) > HISTORY_POINTS else None


def stamps_of(table: Any) -> Times:
    """The moments of a table's rows, int64 microseconds.

    Raises:
        UnsoundError: there are fewer than two, they are no whole numbers, or they do not ascend.
    """
    values = table["timestamp"].to_numpy()
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise UnsoundError("stamps", f"its timestamps are {values.dtype}; they must be whole microseconds")
    if len(values) and not -MOST_US < int(values.min()) <= int(values.max()) < MOST_US:
        raise UnsoundError("stamps", f"its timestamps lie beyond {MOST_US} us")
    stamps: Times = values.astype(np.int64)
    if len(stamps) < 2 or (np.diff(stamps) <= 0).any():
        raise UnsoundError("stamps", f"its {len(stamps)} timestamps must be at least two, and ascend")
    return stamps


def check_gaps(stamps: Times, moments: Times, most_us: int) -> None:
    """Make sure that nothing is interpolated over a gap.

    Args:
        stamps: int64, ascending, of what is interpolated.
        moments: int64, where it is wanted, within them.
        most_us: the longest gap.

    Raises:
        UnsoundError: a moment lies between two stamps that are further apart.
    """
    after = np.searchsorted(stamps, moments)
    known = stamps[after] == moments
    gaps = np.where(known, 0, stamps[after] - stamps[np.maximum(after - 1, 0)])
    if gaps.max() > most_us:
        at = int(gaps.argmax())
        raise UnsoundError(
            "motion gap",
            f"{gaps[at] / 1e3:.0f} ms without a pose around {moments[at]} us; at most {most_us / 1e3:.0f} "
            "are bridged (are its timestamps microseconds?)",
        )
