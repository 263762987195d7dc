"""How far a predicted path is from the one that was driven.

Shapes: S sample, N way-points.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def min_ade(predicted_xyz: Array, future_xyz: Array) -> float:
    """The least average displacement error over samples, metres (specification 9).

    Args:
        predicted_xyz: [S, N, 3], in the ego frame at t0.
        future_xyz: [N, 3], what the vehicle did.
    """
    distance_SN = np.linalg.norm(predicted_xyz[..., :2] - future_xyz[None, :, :2], axis=-1)
    return float(distance_SN.mean(axis=-1).min())


def constant_velocity(history_xyz: Array, points: int) -> Array:
    """The path of a vehicle that keeps the velocity of its last history step.

    Args:
        history_xyz: [16, 3]; the last point is the origin.
        points: number of way-points, one history step apart.

    Returns:
        [1, points, 3].
    """
    step = history_xyz[-1] - history_xyz[-2]
    path: Array = history_xyz[-1] + np.arange(1, points + 1, dtype=np.float32)[:, None] * step
    return path[None]
