"""How the ego vehicle moves: a speed over time and an offset over distance make a unicycle's track."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alpamayo_dflash.world.road import Floats, Road, running_integral

TRACK_STEP_S = 0.02
BEFORE_S = 5.2  # the track begins this long before t0
AFTER_S = 6.8  # and ends this long after it
_ZERO = round(BEFORE_S / TRACK_STEP_S)
_TIMES = (np.arange(round((BEFORE_S + AFTER_S) / TRACK_STEP_S) + 1, dtype=np.float64) - _ZERO) * TRACK_STEP_S
_SMOOTHING = np.hanning(43)[1:-1] / np.hanning(43)[1:-1].sum()  # 0.8 s: speeds have no kinks


@dataclass(frozen=True)
class Shift:
    """A smooth move across the road: `amount` metres to the left between `start` and `start + length`."""

    start: float
    length: float
    amount: float


@dataclass(frozen=True)
class Sway:
    """The small oscillation of a driver in the lane: `amplitude * sin(2 pi s / length + phase)`."""

    amplitude: float = 0.0
    length: float = 50.0
    phase: float = 0.0


@dataclass(frozen=True, eq=False)
class Track:
    """The ego's motion in the road frame, every 20 ms from t0 - 5.2 s to t0 + 6.8 s.

    It is a unicycle's: velocity along the heading, heading rate = curvature * speed.

    Attributes:
        t: [n] seconds after t0.
        x: [n] metres.
        y: [n] metres.
        yaw: [n] radians.
        speed: [n] m/s, never negative.
        acceleration: [n] m/s² along the heading.
        curvature: [n] 1/m.
        distance: [n] metres driven since t0 (negative before).
    """

    t: Floats
    x: Floats
    y: Floats
    yaw: Floats
    speed: Floats
    acceleration: Floats
    curvature: Floats
    distance: Floats

    def pose(self, time_s: float) -> tuple[float, float, float]:
        """(x, y, yaw) at a time after t0, between the track's samples by straight lines."""
        place = min(max((time_s + BEFORE_S) / TRACK_STEP_S, 0.0), len(self.t) - 1.000001)
        i = int(place)
        part = place - i
        x, y, yaw = (float(a[i] + part * (a[i + 1] - a[i])) for a in (self.x, self.y, self.yaw))
        return x, y, yaw

    def index(self, time_s: float) -> int:
        """The sample nearest to a time after t0."""
        return round(time_s / TRACK_STEP_S) + _ZERO


def distance_driven(knots: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Smoothed speed [n] and distance since t0 [n] on the track's times, from (time, speed) knots."""
    times, speeds = np.array(knots).T
    raw = np.interp(_TIMES, times, np.maximum(speeds, 0.0))
    half = len(_SMOOTHING) // 2
    speed = np.convolve(np.pad(raw, half, mode="edge"), _SMOOTHING, mode="valid")
    return speed, _integral(speed)


def drive(road: Road, knots: Sequence[tuple[float, float]], shifts: Sequence[Shift], sway: Sway) -> Track:
    """Follow the ego's lane of `road`.

    Args:
        road: the road.
        knots: (seconds after t0, m/s), joined by straight lines and then smoothed over 0.8 s.
        shifts: moves across the road.
        sway: the driver's oscillation in the lane.
    """
    speed, distance = distance_driven(knots)
    d, slope = _offset(distance, shifts, sway)
    bend = np.interp(distance, road.s, road.curvature)
    yaw = np.interp(distance, road.s, road.heading) + np.arctan2(slope, 1.0 - bend * d)
    x0, y0 = road.point(0.0, float(d[_ZERO]))
    x = x0 + _integral(speed * np.cos(yaw))
    y = y0 + _integral(speed * np.sin(yaw))
    return Track(
        _TIMES,
        x,
        y,
        yaw,
        speed,
        np.gradient(speed, TRACK_STEP_S),
        _curvature(road, shifts, sway, distance),
        distance,
    )


def _offset(s: Floats, shifts: Sequence[Shift], sway: Sway) -> tuple[Floats, Floats]:
    """The offset from the lane's centre at s [n] and its derivative; shifts are quintic steps."""
    rate = 2 * np.pi / sway.length
    d = sway.amplitude * np.sin(rate * s + sway.phase)
    slope = sway.amplitude * rate * np.cos(rate * s + sway.phase)
    for shift in shifts:
        u = np.clip((s - shift.start) / shift.length, 0.0, 1.0)
        d = d + shift.amount * u**3 * (10 - 15 * u + 6 * u**2)
        slope = slope + shift.amount / shift.length * 30 * u**2 * (1 - u) ** 2
    return d, slope


def _curvature(road: Road, shifts: Sequence[Shift], sway: Sway, distance: Floats) -> Floats:
    """The path's curvature [n] at each distance driven: the heading's change over the way."""
    s = np.arange(distance[0] - 1.0, distance[-1] + 1.0, 0.25)
    d, slope = _offset(s, shifts, sway)
    bend = np.interp(s, road.s, road.curvature)
    heading = np.interp(s, road.s, road.heading) + np.arctan2(slope, 1.0 - bend * d)
    return np.interp(distance, s, np.gradient(heading, s))


def _integral(values: Floats) -> Floats:
    """The running integral over the track's times, 0 at t0."""
    result = running_integral(values, TRACK_STEP_S)
    result -= result[_ZERO]
    return result
