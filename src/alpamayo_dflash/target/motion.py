"""The unicycle action space, both ways, and the discrete tokens of actions (specification 8.4-8.6, 4.4).

An action is (acceleration, curvature), normalised; a trajectory is xyz and rotation in the frame of t0.
Everything here is float32, or the float64 that it is given.

Shapes: N way-points, M history points; leading dimensions are free.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.target.config import ActionSpaceConfig, FutureTokenizerConfig, HistoryTokenizerConfig

_MAX_RETRIES = 20
_CONSTANTS = ("accel_mean", "accel_std", "curvature_mean", "curvature_std")


class ActionSpace(nn.Module):
    """The constants of the action space, as R1's checkpoint stores them.

    The four scalars are buffers, because R1's file holds them (in bfloat16, which is what acts).
    """

    accel_mean: Tensor
    accel_std: Tensor
    curvature_mean: Tensor
    curvature_std: Tensor

    def __init__(self, config: ActionSpaceConfig) -> None:
        super().__init__()
        self.config = config
        for name in _CONSTANTS:
            self.register_buffer(name, torch.tensor(getattr(config, name), dtype=torch.float32))

    def reset(self, device: torch.device, *, rounded: bool) -> None:
        """Set the constants from the config, rounded to bfloat16 if asked (specification 1.5)."""
        for name in _CONSTANTS:
            value = torch.tensor(getattr(self.config, name), dtype=torch.float32, device="cpu")
            setattr(self, name, (value.bfloat16().float() if rounded else value).to(device))

    def denormalise(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Split [..., N, 2] into acceleration (m/s²) and curvature (1/m), each [..., N]."""
        acceleration = action[..., 0] * self.accel_std.to(action) + self.accel_mean.to(action)
        curvature = action[..., 1] * self.curvature_std.to(action) + self.curvature_mean.to(action)
        return acceleration, curvature

    def normalise(self, acceleration: Tensor, curvature: Tensor) -> Tensor:
        """Join acceleration (m/s²) and curvature (1/m), each [..., N], to [..., N, 2]."""
        first = (acceleration - self.accel_mean.to(acceleration)) / self.accel_std.to(acceleration)
        second = (curvature - self.curvature_mean.to(curvature)) / self.curvature_std.to(curvature)
        return torch.stack((first, second), dim=-1)

    def within_bounds(self, action: Tensor) -> Tensor:
        """Whether every way-point of [..., N, 2] is inside the bounds, bool [...]. Nothing is clipped."""
        acceleration, curvature = self.denormalise(action)
        low_a, high_a = self.config.accel_bounds
        low_k, high_k = self.config.curvature_bounds
        inside = (
            (acceleration >= low_a) & (acceleration <= high_a) & (curvature >= low_k) & (curvature <= high_k)
        )
        return inside.all(-1)

    def to_trajectory(
        self, action: Tensor, history_xyz: Tensor, history_rot: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Integrate actions to a trajectory (specification 8.4).

        Args:
            action: normalised, [..., N, 2].
            history_xyz: [..., M, 3] metres, oldest first; leading dimensions broadcast with the action's.
            history_rot: [..., M, 3, 3].

        Returns:
            xyz [..., N, 3] metres and rot [..., N, 3, 3].
        """
        start = initial_speed(history_xyz, history_rot, self.config).to(action).expand(action.shape[:-2])
        return self.drive(action, start, history_xyz[..., -1, 2].to(action))

    def drive(self, action: Tensor, start: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
        """Integrate actions from a known speed: tensor operations alone, so that they can be captured.

        Args:
            action: normalised, [..., N, 2].
            start: [...] m/s, the speed at t0.
            height: metres, the z of the whole trajectory, broadcast to [...].

        Returns:
            As `to_trajectory`.
        """
        dt = self.config.dt
        acceleration, curvature = self.denormalise(action)
        speed = _from(start, start.unsqueeze(-1) + (acceleration * dt).cumsum(-1))
        turn = (curvature * speed[..., :-1] * dt).cumsum(-1) + (curvature * acceleration * dt**2 / 2).cumsum(
            -1
        )
        heading = _from(torch.zeros_like(start), turn)
        velocity = speed.unsqueeze(-1) * torch.stack((heading.cos(), heading.sin()), dim=-1)
        xy = dt / 2 * velocity[..., :-1, :].cumsum(-2) + dt / 2 * velocity[..., 1:, :].cumsum(-2)
        z = height[..., None, None].expand(*xy.shape[:-1], 1)
        return torch.cat((xy, z), dim=-1), yaw_matrices(turn)

    def from_trajectory(self, xyz: Tensor, rot: Tensor, history_xyz: Tensor, history_rot: Tensor) -> Tensor:
        """Find the actions of a trajectory by regularised least squares (specification 8.6).

        Args:
            xyz: [..., N, 3] metres, the future.
            rot: [..., N, 3, 3].
            history_xyz: [..., M, 3].
            history_rot: [..., M, 3, 3].

        Returns:
            The normalised actions, [..., N, 2], in the dtype of `xyz`.
        """
        config, dt = self.config, self.config.dt
        dtype = xyz.dtype
        # The systems are ill-conditioned: in float32 the answer's fourth digit depends on the CPU's BLAS.
        xyz, rot = xyz.double(), rot.double()
        points = torch.cat((history_xyz[..., -1:, :2].to(xyz), xyz[..., :2]), dim=-2)
        heading = _smooth_heading(_unwrap(_yaw(rot)), config)
        start = initial_speed(history_xyz.to(xyz), history_rot.to(xyz), config)
        speed = _speeds(points, heading, config, start)
        acceleration = _accelerations(speed, config)
        arc = dt * speed[..., :-1] + dt**2 / 2 * acceleration
        curvature = _curvatures(arc, heading.diff(dim=-1), config)
        return self.normalise(acceleration, curvature).to(dtype)


def yaw_matrices(yaw: Tensor) -> Tensor:
    """Rotations about +z, [..., 3, 3], by `yaw` [...] radians."""
    cos, sin = yaw.cos(), yaw.sin()
    plane = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    matrices = functional.pad(plane, (0, 1, 0, 1))
    matrices[..., 2, 2] = 1.0
    return matrices


def initial_speed(history_xyz: Tensor, history_rot: Tensor, config: ActionSpaceConfig) -> Tensor:
    """The speed at t0, m/s, by regularised least squares over the history (specification 8.5).

    Args:
        history_xyz: [..., M, 3] metres, oldest first.
        history_rot: [..., M, 3, 3].
        config: dt and the weights.

    Returns:
        [...] in the dtype of `history_xyz`, signed: negative means backing. Solved in float64, for the
        reason that `from_trajectory` gives.
    """
    heading = _unwrap(_yaw(history_rot.double()))
    return _speeds(history_xyz[..., :2].double(), heading, config)[..., -1].to(history_xyz.dtype)


def tokens_of_action(action: Tensor, config: FutureTokenizerConfig) -> Tensor:
    """Bins, int64 [..., 2N], of normalised actions [..., N, 2]; acceleration first in each pair."""
    low, high = action.new_tensor(config.dims_min), action.new_tensor(config.dims_max)
    unit = (action - low) / (high - low)
    return (unit * (config.num_bins - 1)).round().long().clamp(0, config.num_bins - 1).flatten(-2)


def action_of_tokens(bins: Tensor, config: FutureTokenizerConfig) -> Tensor:
    """Normalised actions, float32 [..., N, 2], of bins [..., 2N]."""
    pairs = bins.reshape(*bins.shape[:-1], -1, len(config.dims_min))
    unit = pairs.float() / (config.num_bins - 1)
    low, high = unit.new_tensor(config.dims_min), unit.new_tensor(config.dims_max)
    return unit * (high - low) + low


def _from(first: Tensor, rest: Tensor) -> Tensor:
    """Put `first` [...] before `rest` [..., N]."""
    return torch.cat((first.unsqueeze(-1), rest), dim=-1)


def _yaw(rot: Tensor) -> Tensor:
    return torch.atan2(rot[..., 1, 0], rot[..., 0, 0])


def _unwrap(angle: Tensor) -> Tensor:
    """Add whole turns so that no step [..., M] along the last dimension is above half a turn."""
    step = angle.diff(dim=-1)
    turns = torch.round(step / (2 * torch.pi)).cumsum(-1) * (2 * torch.pi)
    return torch.cat((angle[..., :1], angle[..., 1:] - turns), dim=-1)


def _difference_gram(count: int, stencil: tuple[float, ...], like: Tensor) -> Tensor:
    """D'D of a finite-difference operator over `count` entries, [count, count]."""
    if count < len(stencil):
        return like.new_zeros(count, count)
    operator = like.new_zeros(count - len(stencil) + 1, count)
    for offset, weight in enumerate(stencil):
        operator.diagonal(offset).fill_(weight)
    return operator.T @ operator


def _third(count: int, like: Tensor) -> Tensor:
    return _difference_gram(count, (-1.0, 3.0, -3.0, 1.0), like)


def _second(count: int, like: Tensor) -> Tensor:
    return _difference_gram(count, (-1.0, 2.0, -1.0), like)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a positive-definite system [..., n, n] for one right side [..., n]."""
    solution: Tensor = torch.cholesky_solve(right.unsqueeze(-1), torch.linalg.cholesky(matrix))
    return solution.squeeze(-1)


def _solve_ridged(matrix: Tensor, ridge: float, right: Tensor) -> Tensor:
    """As `_solve` with a ridge, which grows tenfold for as long as the factorisation fails."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(_MAX_RETRIES):
        factor, info = torch.linalg.cholesky_ex(matrix + ridge * eye)
        if not bool(info.any()):
            return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
        ridge *= 10
    raise ValueError("the trajectory cannot be turned into actions: its system is not positive definite")


def _speeds(
    points: Tensor, heading: Tensor, config: ActionSpaceConfig, start: Tensor | None = None
) -> Tensor:
    """Speeds [..., n] that carry the vehicle along points [..., n, 2] with headings [..., n].

    The trapezoid of two neighbouring velocities covers each step; `start` fixes the first speed.
    """
    count = points.shape[-2]
    unit = torch.stack((heading.cos(), heading.sin()), dim=-1)
    system = points.new_zeros(*points.shape[:-2], count - 1, 2, count)
    steps = torch.arange(count - 1, device=points.device)
    system[..., steps, :, steps] = unit[..., :-1, :].movedim(-2, 0)
    system[..., steps, :, steps + 1] = unit[..., 1:, :].movedim(-2, 0)
    system = system.flatten(-3, -2)
    right = (2 / config.dt * points.diff(dim=-2)).flatten(-2)
    gram = system.mT @ system + config.v_lambda / config.dt**6 * _third(count, points)
    target = (system.mT @ right.unsqueeze(-1)).squeeze(-1)
    ridge = config.v_ridge * torch.eye(count, dtype=points.dtype, device=points.device)
    if start is None:
        return _solve(gram + ridge, target)
    target = target[..., 1:] - gram[..., 1:, 0] * start.unsqueeze(-1)
    return _from(start, _solve(gram[..., 1:, 1:] + ridge[1:, 1:], target))


def _smooth_heading(yaw: Tensor, config: ActionSpaceConfig) -> Tensor:
    """Headings [..., N + 1], the first of them 0, close to `yaw` [..., N] and smooth."""
    count = yaw.shape[-1] + 1
    smooth = config.theta_lambda / config.dt**6 * _third(count, yaw)[1:, 1:]
    eye = torch.eye(count - 1, dtype=yaw.dtype, device=yaw.device)
    matrix = smooth + (1 + config.theta_ridge) * eye
    return _from(torch.zeros_like(yaw[..., 0]), _solve(matrix.expand(*yaw.shape[:-1], -1, -1), yaw))


def _accelerations(speed: Tensor, config: ActionSpaceConfig) -> Tensor:
    """Accelerations [..., N] of speeds [..., N + 1]."""
    right = speed.diff(dim=-1) / config.dt
    count = right.shape[-1]
    eye = torch.eye(count, dtype=speed.dtype, device=speed.device)
    matrix = eye + config.a_lambda / config.dt**4 * _second(count, speed)
    return _solve_ridged(matrix.expand(*right.shape[:-1], -1, -1), config.a_ridge, right)


def _curvatures(arc: Tensor, turn: Tensor, config: ActionSpaceConfig) -> Tensor:
    """Curvatures [..., N] of arc lengths and turns, each [..., N]."""
    smooth = config.kappa_lambda / config.dt**4 * _second(arc.shape[-1], arc)
    return _solve_ridged(torch.diag_embed(arc**2) + smooth, config.kappa_ridge, arc * turn)


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
