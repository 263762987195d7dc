"""A window built from arrays of one's own cameras and odometry: no dataset, no clip on a disk.

    python examples/own_cameras.py

Frames may be of any size; the target's processor resizes them. Four cameras with four frames each, 0.1 s
apart, are what Alpamayo was trained on.
"""

import numpy as np

from alpamayo_dflash import Alpamayo, SpeculativeDecoder, Window

CAMERAS = (0, 1, 2, 6)  # the dataset's numbers: cross left, front wide, cross right, front tele
HISTORY = 16  # points of the ego history, 0.1 s apart, the last one at t0


def in_ego_frame(positions: np.ndarray, rotations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poses in a world's frame as the target wants them: seen from the last one.

    Args:
        positions: [T, 3] metres, x forward, y left, z up where the last rotation is none.
        rotations: [T, 3, 3], from the vehicle's frame to the world's.

    Returns:
        float32 [T, 3] and [T, 3, 3]; the last point is the origin, its rotation the identity.
    """
    to_ego = rotations[-1].T
    xyz = (positions - positions[-1]) @ to_ego.T
    return xyz.astype(np.float32), (to_ego @ rotations).astype(np.float32)


def left_curve(speed_m_s: float = 8.0, yaw_rate: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """What odometry gives of a vehicle on a curve: positions and rotations in some world's frame."""
    times = np.arange(HISTORY) * 0.1
    yaw = 0.7 + yaw_rate * times
    velocity = speed_m_s * np.stack((np.cos(yaw), np.sin(yaw), np.zeros(HISTORY)), axis=1)
    positions = np.array([120.0, -40.0, 2.0]) + np.cumsum(velocity, axis=0) * 0.1
    cos, sin, zero, one = np.cos(yaw), np.sin(yaw), np.zeros(HISTORY), np.ones(HISTORY)
    rows = [(cos, -sin, zero), (sin, cos, zero), (zero, zero, one)]
    return positions, np.stack([np.stack(row, axis=-1) for row in rows], axis=1)


def camera_frames(height: int = 270, width: int = 480) -> np.ndarray:
    """Stands for the cameras: uint8 RGB [cameras, frames, height, width, 3], the oldest frame first."""
    frames = np.empty((len(CAMERAS), 4, height, width, 3), dtype=np.uint8)
    frames[:, :, : height // 2] = (150, 190, 230)  # sky
    frames[:, :, height // 2 :] = (88, 88, 94)  # road
    return frames


if __name__ == "__main__":
    history_xyz, history_rot = in_ego_frame(*left_curve())
    window = Window(
        clip_id="my-drive",  # with t0_us and the seed it fixes every random choice
        t0_us=5_100_000,
        cameras=CAMERAS,
        frames=camera_frames(),
        ego_history_xyz=history_xyz,
        ego_history_rot=history_rot,
    )
    result = SpeculativeDecoder(Alpamayo.from_pretrained("tiny")).generate(window, num_traj_samples=2)
    for text, path in zip(result.coc, result.pred_xyz, strict=True):
        ahead, left, _ = path[-1].tolist()
        print(f"{text} | in 6.4 s {ahead:.1f} m ahead, {left:.1f} m to the left")
