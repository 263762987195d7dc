"""The delta tokeniser of the ego history (specification 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from alpamayo_dflash.target.actions import yaw_matrices
from alpamayo_dflash.target.config import HistoryTokenizerConfig

# The official code's fit of headings where yaw is not encoded.
_FIT_POINTS = 10
_FIT_ORDER = 3


def encode_history(xyz: Tensor, rot: Tensor, config: HistoryTokenizerConfig) -> Tensor:
    """Turn history poses into bins.

    Args:
        xyz: float [..., M, 3] metres, oldest first, in the frame of t0.
        rot: float [..., M, 3, 3]; used with yaw on only.
        config: bins and ranges.

    Returns:
        int64 [..., M * values_per_point], point-major. The first delta is the oldest point itself.
    """
    xyz = xyz.float()
    low, high = _limits(config, xyz)
    deltas = torch.diff(xyz, dim=-2, prepend=torch.zeros_like(xyz[..., :1, :]))
    if config.predict_yaw:
        # The sign is the official code's: minus the usual yaw.
        yaw = torch.atan2(rot[..., 0, 1].float(), rot[..., 0, 0].float())
        turn = torch.diff(yaw, dim=-1, prepend=torch.zeros_like(yaw[..., :1]))
        deltas = torch.cat((deltas, torch.atan2(turn.sin(), turn.cos()).unsqueeze(-1)), dim=-1)
    unit = (deltas - low) / (high - low)
    return (unit * (config.num_bins - 1)).round().long().clamp(0, config.num_bins - 1).flatten(-2)


def decode_history(bins: Tensor, config: HistoryTokenizerConfig) -> tuple[Tensor, Tensor]:
    """Turn bins back into poses.

    Args:
        bins: int64 [..., M * values_per_point].
        config: bins and ranges.

    Returns:
        xyz float32 [..., M, 3] metres and rot float32 [..., M, 3, 3]. With yaw on the rotations turn by the
        encoded yaw, whose sign, as in the official code, is opposite to that of the poses that were encoded;
        with yaw off they follow the path.
    """
    values = bins.reshape(*bins.shape[:-1], -1, config.values_per_point).float()
    low, high = _limits(config, values)
    poses = (values / (config.num_bins - 1) * (high - low) + low).cumsum(-2)
    yaw = poses[..., 3] if config.predict_yaw else path_yaw(poses[..., :2])
    return poses[..., :3], yaw_matrices(yaw)


def path_yaw(points: Tensor) -> Tensor:
    """Headings [..., M] of a path [..., M, 2], by cubic fits over ten neighbouring points.

    A least-squares fit is linear in its points, so its slope at each point is one row of a matrix.
    """
    count = points.shape[-2]
    width = min(_FIT_POINTS, count)
    slopes = torch.zeros(count, count, dtype=torch.float64)
    times = torch.arange(width, dtype=torch.float64)
    fit = torch.linalg.pinv(torch.stack([times**power for power in range(_FIT_ORDER + 1)], dim=-1))
    for index in range(count):
        start = min(max(index - _FIT_POINTS // 2, 0), count - width)
        at = float(index - start)
        derivative = fit.new_tensor([power * at ** max(power - 1, 0) for power in range(_FIT_ORDER + 1)])
        slopes[index, start : start + width] = derivative @ fit
    velocity = slopes.to(points.device) @ points.double()
    return torch.atan2(velocity[..., 1], velocity[..., 0]).to(points.dtype)


def _limits(config: HistoryTokenizerConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    low, high = list(config.ego_xyz_min), list(config.ego_xyz_max)
    if config.predict_yaw:
        low.append(config.ego_yaw_min)
        high.append(config.ego_yaw_max)
    return like.new_tensor(low), like.new_tensor(high)
