"""The road of a scene: a centre line in the plane, lanes beside it, and coordinates along and across it.

Road coordinates are (s, d): metres along the centre line of the ego's lane, and metres to the left of it.
The road frame is the plane frame at s = 0: x along the road, y to the left, z up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LANE_WIDTH_M = 3.5
HALF_LANE_M = LANE_WIDTH_M / 2
_STEP_M = 0.5
_BEHIND_M = 80.0
_AHEAD_M = 180.0
_STATIONS = np.arange(-_BEHIND_M, _AHEAD_M + _STEP_M, _STEP_M)
_SPIRAL_M = 5.0  # over this length a bend's curvature comes and goes


@dataclass(frozen=True)
class Lanes:
    """How many lanes lie beside the ego's.

    Attributes:
        left: lanes of the ego's direction to its left.
        right: lanes of the ego's direction to its right.
        oncoming: lanes of the other direction, left of all of these.
    """

    left: int = 0
    right: int = 0
    oncoming: int = 1

    @property
    def divider_d(self) -> float:
        """Where the lanes of the ego's direction end on the left, metres."""
        return HALF_LANE_M + self.left * LANE_WIDTH_M

    @property
    def left_edge_d(self) -> float:
        """The road's left edge, metres."""
        return self.divider_d + self.oncoming * LANE_WIDTH_M

    @property
    def right_edge_d(self) -> float:
        """The road's right edge, metres (negative)."""
        return -HALF_LANE_M - self.right * LANE_WIDTH_M


@dataclass(frozen=True, eq=False)
class Road:
    """A road: lanes along a sampled centre line.

    Attributes:
        lanes: the lanes beside the ego's.
        s: [stations] metres, rising, even steps.
        heading: [stations] radians, 0 at s = 0, left positive.
        curvature: [stations] 1/m.
        x: [stations] metres in the road frame.
        y: [stations] metres in the road frame.
    """

    lanes: Lanes
    s: Floats
    heading: Floats
    curvature: Floats
    x: Floats
    y: Floats

    def point(self, s: float, d: float) -> tuple[float, float]:
        """The place (x, y) in the road frame of the road coordinates (s, d)."""
        x, y = self.points(np.array([s]), d)
        return float(x[0]), float(y[0])

    def points(self, s: Floats, d: float | Floats) -> tuple[Floats, Floats]:
        """The places (x [n], y [n]) of the road coordinates s [n] and d (a number or [n])."""
        heading = self.heading_at(s)
        x = np.interp(s, self.s, self.x) - d * np.sin(heading)
        y = np.interp(s, self.s, self.y) + d * np.cos(heading)
        return x, y

    def heading_at(self, s: Floats) -> Floats:
        """The road's heading at s [n], radians."""
        return np.interp(s, self.s, self.heading)

    def distance_to(self, x: float, y: float) -> float:
        """The distance from a place to the centre line of the ego's lane, metres."""
        return float(np.sqrt(np.min((self.x - x) ** 2 + (self.y - y) ** 2)))


def build_road(
    lanes: Lanes, *, base_curvature: float = 0.0, bend: tuple[float, float, float] | None = None
) -> Road:
    """Lay out a road.

    Args:
        lanes: the lanes beside the ego's.
        base_curvature: a curvature that the whole road has, 1/m.
        bend: a sharp bend on top of it: (start in metres, curvature in 1/m, angle in radians > 0).
    """
    s = _STATIONS
    curvature = np.full_like(s, base_curvature)
    if bend is not None:
        start, peak, angle = bend
        end = start + angle / abs(peak) + _SPIRAL_M
        knots = [start, start + _SPIRAL_M, end - _SPIRAL_M, end]
        curvature = curvature + np.interp(s, knots, [0.0, peak, peak, 0.0])
    heading = running_integral(curvature, _STEP_M)
    zero = int(_BEHIND_M / _STEP_M)
    heading -= heading[zero]
    x, y = running_integral(np.cos(heading), _STEP_M), running_integral(np.sin(heading), _STEP_M)
    return Road(lanes, s, heading, curvature, x - x[zero], y - y[zero])


def running_integral(values: Floats, step: float) -> Floats:
    """The running integral by trapezoids, 0 at the first entry."""
    result = np.zeros_like(values)
    np.cumsum((values[1:] + values[:-1]) * (step / 2), out=result[1:])
    return result
