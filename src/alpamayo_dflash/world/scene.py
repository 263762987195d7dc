"""Scenes: from a seed to an event, a road, the things on it and the ego's motion.

Every event looks different from the others at 64 x 128 pixels, while the ego's history says little of it:
speeds overlap between events, and a standing ego may wait for a light, a sign, a vehicle, or be about to go.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from alpamayo_dflash.clips.window import FUTURE_POINTS, HISTORY_POINTS, STEP_S
from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.world.facts import Facts
from alpamayo_dflash.world.kinematics import Track
from alpamayo_dflash.world.road import Road

Colour = tuple[int, int, int]
Lights = Literal["off", "brake", "hazard", "left", "right", "red", "green"]
View = Literal["", "back", "left", "right"]
Knots = list[tuple[float, float]]

# Length, width, height in metres.
VEHICLE_SIZES = {
    "car": (4.4, 1.8, 1.5),
    "van": (5.4, 2.0, 2.4),
    "truck": (8.0, 2.5, 3.6),
    "bus": (11.0, 2.5, 3.1),
}


@dataclass(frozen=True)
class Item:
    """A thing that stands or moves in the scene, placed in the road frame at t0.

    Attributes:
        kind: what it is, a name that `shapes.shape` knows.
        x: metres.
        y: metres.
        yaw: radians; of vehicles the direction of travel.
        velocity: m/s in the road frame.
        acceleration: m/s² in the road frame.
        colour: paint, clothes or leaves.
        lights: what its lights show.
        view: of persons whether one sees their back, or where they face; of others "".
        size: a factor on its usual size.
    """

    kind: str
    x: float
    y: float
    yaw: float = 0.0
    velocity: tuple[float, float] = (0.0, 0.0)
    acceleration: tuple[float, float] = (0.0, 0.0)
    colour: Colour = (128, 128, 128)
    lights: Lights = "off"
    view: View = ""
    size: float = 1.0


@dataclass(frozen=True)
class RoadMarks:
    """What is painted on the road besides its lanes, at metres along it; None where there is none."""

    stop_line: float | None = None
    crosswalk: float | None = None
    junction: tuple[float, float] | None = None


@dataclass(frozen=True)
class Look:
    """Light and surroundings: brightness 0 to 1, and the sky's and the ground's colours."""

    brightness: float
    sky: Colour
    ground: Colour


@dataclass(frozen=True, eq=False)
class Scene:
    """One synthetic driving scene. The road frame is the ego's lane at t0; see `road.py`.

    Attributes:
        seed: the number that it was drawn from.
        clip_id: its name, in the form of the dataset's clip ids.
        facts: what it is about.
        road: the road.
        track: the ego's motion.
        items: all that stands or moves.
        marks: paint on the road.
        look: light and surroundings.
    """

    seed: int
    clip_id: str
    facts: Facts
    road: Road
    track: Track
    items: tuple[Item, ...]
    marks: RoadMarks
    look: Look

    def history(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Positions [16, 3] and rotations [16, 3, 3] at t0 - 1.5 s ... t0, in the ego frame at t0."""
        return self._poses(range(1 - HISTORY_POINTS, 1))

    def future(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Positions [64, 3] and rotations [64, 3, 3] at t0 + 0.1 s ... t0 + 6.4 s, in the ego frame at t0."""
        return self._poses(range(1, FUTURE_POINTS + 1))

    def _poses(self, steps: range) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The poses at tenths of a second after t0."""
        track, zero = self.track, self.track.index(0.0)
        rows = np.array([track.index(step * STEP_S) for step in steps])
        cos, sin = np.cos(track.yaw[zero]), np.sin(track.yaw[zero])
        dx, dy = track.x[rows] - track.x[zero], track.y[rows] - track.y[zero]
        xyz = np.zeros((len(rows), 3), np.float32)
        xyz[:, 0], xyz[:, 1] = cos * dx + sin * dy, cos * dy - sin * dx
        return xyz, yaw_rotations(track.yaw[rows] - track.yaw[zero]).astype(np.float32)


def yaw_rotations(yaw: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rotation matrices [n, 3, 3] about z by the angles [n]."""
    rotations = np.zeros((len(yaw), 3, 3))
    rotations[:, 0, 0] = rotations[:, 1, 1] = np.cos(yaw)
    rotations[:, 1, 0] = np.sin(yaw)
    rotations[:, 0, 1] = -rotations[:, 1, 0]
    rotations[:, 2, 2] = 1.0
    return rotations


def scene_seed(world_seed: int, chunk: int, index: int) -> int:
    """The seed of clip number `index` of a chunk: a number below 2**63, spread by numpy's SeedSequence."""
    sequence = np.random.SeedSequence((generator_seed(world_seed), chunk, index))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def clip_id_of(seed: int) -> str:
    """The clip id of a scene's seed: a UUID of version 5."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"alpamayo-dflash world {seed}"))
