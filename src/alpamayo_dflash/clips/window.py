"""A window: what the target sees of one clip at one moment, and what the ego vehicle then did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Index and name of each camera of the dataset (specification 3.1), in the order the prompt uses.
CAMERAS = {
    0: "camera_cross_left_120fov",
    1: "camera_front_wide_120fov",
    2: "camera_cross_right_120fov",
    3: "camera_rear_left_70fov",
    4: "camera_rear_tele_30fov",
    5: "camera_rear_right_70fov",
    6: "camera_front_tele_30fov",
}
DEFAULT_CAMERAS = (0, 1, 2, 6)
FRAMES_PER_CAMERA = 4
HISTORY_POINTS = 16
FUTURE_POINTS = 64
STEP_S = 0.1
STEP_US = round(STEP_S * 1e6)


def check_cameras(cameras: Sequence[int]) -> tuple[int, ...]:
    """Dataset indices of cameras, in ascending order.

    Raises:
        ValueError: there are none, one is unknown, or one stands there twice.
    """
    if not cameras or len(set(cameras)) != len(cameras) or not set(cameras) <= set(CAMERAS):
        raise ValueError(f"cameras {tuple(cameras)}: should be different ones of {CAMERAS}")
    return tuple(sorted(cameras))


def whole_us(t0_us: float) -> int:
    """A moment as a whole number of microseconds; 5.1e6 is 5100000.

    Raises:
        ValueError: it is none.
    """
    try:
        whole = int(t0_us)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != t0_us:
        raise ValueError(f"t0_us is {t0_us!r}; it must be a whole number of microseconds")
    return whole


@dataclass(frozen=True)
class Window:
    """One moment of one clip. Poses are in the ego frame at t0: x forward, y left, z up; metres.

    Attributes:
        clip_id: the dataset's name of the clip.
        t0_us: the moment, microseconds on the clip's clock.
        cameras: dataset camera indices, ascending.
        frames: uint8 [cameras, frames, height, width, 3] RGB, oldest frame first.
        ego_history_xyz: float32 [16, 3], t0 - 1.5 s ... t0 (the last point is the origin).
        ego_history_rot: float32 [16, 3, 3].
        ego_future_xyz: float32 [64, 3], t0 + 0.1 s ... t0 + 6.4 s; None where the clip ends before.
        ego_future_rot: float32 [64, 3, 3], or None.

    Raises:
        ValueError: t0_us is no whole number of microseconds.
    """

    clip_id: str
    t0_us: int
    cameras: tuple[int, ...]
    frames: npt.NDArray[np.uint8]
    ego_history_xyz: npt.NDArray[np.float32]
    ego_history_rot: npt.NDArray[np.float32]
    ego_future_xyz: npt.NDArray[np.float32] | None = None
    ego_future_rot: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        """Make the moment a whole number: it is part of the key, and so of the noise."""
        object.__setattr__(self, "t0_us", whole_us(self.t0_us))

    @property
    def key(self) -> str:
        """The window's name, `clip_id@t0_us`: with a seed it fixes every random choice made on it."""
        return f"{self.clip_id}@{self.t0_us}"


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
