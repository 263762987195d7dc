"""Pictures of scenes: pinhole cameras, flat-coloured polygons, drawn from far to near with Pillow.

A picture is 128 x 256 pixels. Cameras stand 1.5 m above a flat ground and look along the horizon.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alpamayo_dflash.clips.config import DEFAULT_T0_US
from alpamayo_dflash.clips.window import (
    CAMERAS,
    DEFAULT_CAMERAS,
    FRAMES_PER_CAMERA,
    STEP_S,
    Window,
)
from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.world.facts import VEHICLES
from alpamayo_dflash.world.road import Floats, Road
from alpamayo_dflash.world.scene import VEHICLE_SIZES, Colour, Item, Scene
from alpamayo_dflash.world.shapes import colour_of, placed, shape

with needs("clips"):
    from PIL import Image, ImageDraw

HEIGHT, WIDTH = 128, 256
FRAME_TIMES_S = tuple((i + 1 - FRAMES_PER_CAMERA) * STEP_S for i in range(FRAMES_PER_CAMERA))
_NEAR_M = 0.4
_GROUND_END_M = 140.0
_SMALLEST_AREA = 0.6  # twice a polygon's area in pixels: smaller ones are left out
_ASPHALT: Colour = (88, 88, 94)
_SHOULDER: Colour = (122, 120, 116)
_WHITE: Colour = (235, 235, 235)
_YELLOW: Colour = (240, 195, 40)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera on the ego vehicle, in the ego frame.

    Attributes:
        yaw: radians, left positive.
        fov: horizontal field of view, radians.
        x: metres forward of the ego's origin.
        y: metres to the left of it.
        z: metres above the ground.
    """

    yaw: float
    fov: float
    x: float = 1.5
    y: float = 0.0
    z: float = 1.5

    @property
    def focal(self) -> float:
        """The focal length, pixels."""
        return WIDTH / 2 / math.tan(self.fov / 2)


# By the dataset's camera index; the names give the fields of view.
CAMERA_MOUNTS = {
    0: Camera(math.radians(55.0), math.radians(120.0), y=0.6),
    1: Camera(0.0, math.radians(120.0)),
    2: Camera(math.radians(-55.0), math.radians(120.0), y=-0.6),
    6: Camera(0.0, math.radians(30.0)),
}


@dataclass(frozen=True, eq=False)
class Mesh:
    """A scene's polygons. Polygons belong to parts, parts are drawn whole, from far to near.

    Attributes:
        vertices: [vertices, 3] metres in the road frame at t0.
        velocity: [vertices, 2] m/s.
        acceleration: [vertices, 2] m/s².
        starts: [polygons] first vertex of each polygon.
        following: [vertices] the next vertex of the same polygon.
        part: [polygons] the part each belongs to.
        part_starts: [parts] first vertex of each part.
        one_sided: [polygons] whether it is seen from outside only.
        colours: one colour a polygon.
        ground_parts: the first parts lie on the ground and are drawn first, in order.
    """

    vertices: Floats
    velocity: Floats
    acceleration: Floats
    starts: npt.NDArray[np.int64]
    following: npt.NDArray[np.int64]
    part: npt.NDArray[np.int64]
    part_starts: npt.NDArray[np.int64]
    one_sided: npt.NDArray[np.bool_]
    colours: tuple[Colour, ...]
    ground_parts: int


@dataclass
class _Builder:
    """Collects polygons for a mesh."""

    brightness: float
    vertices: list[Floats] = field(default_factory=list)
    motion: list[Floats] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    one_sided: list[bool] = field(default_factory=list)
    colours: list[Colour] = field(default_factory=list)

    def dim(self, colour: Colour, shade: float = 1.0) -> Colour:
        """A colour in the scene's light."""
        factor = self.brightness * shade
        return (round(colour[0] * factor), round(colour[1] * factor), round(colour[2] * factor))

    def ground(self, x: Floats, y: Floats, colour: Colour, item: Item | None = None) -> None:
        """A polygon on the ground, a part of its own."""
        vertices = np.zeros((len(x), 3))
        vertices[:, 0], vertices[:, 1] = x, y
        self._extend(vertices, item)
        self.counts.append(len(x))
        self.parts.append(self.next_part)
        self.one_sided.append(False)
        self.colours.append(self.dim(colour))

    @property
    def next_part(self) -> int:
        """The number of the part that would be begun now."""
        return self.parts[-1] + 1 if self.parts else 0

    def add(self, item: Item) -> None:
        """A thing."""
        form, part, begin = shape(item.kind, item.view), self.next_part, 0
        self._extend(placed(item), item)
        self.counts.extend(form.counts)
        self.one_sided.extend([form.solid] * len(form.faces))
        for end in form.part_ends:
            self.parts.extend([part] * (end - begin))
            part, begin = part + 1, end
        for face in form.faces:
            colour = colour_of(face.paint, item)
            self.colours.append(colour if face.shines else self.dim(colour, face.shade))

    def _extend(self, vertices: Floats, item: Item | None) -> None:
        self.vertices.append(vertices)
        still = (0.0, 0.0, 0.0, 0.0)
        motion = still if item is None else (*item.velocity, *item.acceleration)
        self.motion.append(np.broadcast_to(np.array(motion), (len(vertices), 4)))

    def build(self, ground_parts: int) -> Mesh:
        """Join everything."""
        motion = np.concatenate(self.motion)
        counts, part = np.array(self.counts), np.array(self.parts)
        ends = np.cumsum(counts)
        starts = ends - counts
        following = np.arange(1, ends[-1] + 1)
        following[ends - 1] = starts
        first = np.flatnonzero(np.diff(part, prepend=-1))
        return Mesh(
            np.concatenate(self.vertices),
            motion[:, :2],
            motion[:, 2:],
            starts,
            following,
            part,
            starts[first],
            np.array(self.one_sided),
            tuple(self.colours),
            ground_parts,
        )


@functools.lru_cache(maxsize=16)
def build_mesh(scene: Scene) -> Mesh:
    """Turn a scene into polygons. The last scenes' meshes are kept."""
    builder = _Builder(scene.look.brightness)
    _add_road(builder, scene.road)
    _add_marks(builder, scene)
    for item in scene.items:
        if item.kind in VEHICLES:
            _add_shadow(builder, item)
    ground_parts = builder.next_part
    for item in scene.items:
        builder.add(item)
    return builder.build(ground_parts)


def _stations(begin: float, end: float) -> Floats:
    """Distances along the road, closer together near the ego where a step shows most."""
    return np.unique(
        np.concatenate([[begin, end], np.arange(-12.0, 48.0, 6.0), np.arange(48.0, 140.0, 12.0)])
    )


def _strip(builder: _Builder, road: Road, d0: float, d1: float, colour: Colour) -> None:
    """A strip along the whole road between the offsets d0 and d1."""
    s = _stations(-12.0, _GROUND_END_M)
    (x0, y0), (x1, y1) = road.points(s, d0), road.points(s, d1)
    builder.ground(np.concatenate([x0, x1[::-1]]), np.concatenate([y0, y1[::-1]]), colour)


def _patch(
    builder: _Builder, road: Road, s: tuple[float, float], d: tuple[float, float], colour: Colour
) -> None:
    """A four-cornered patch on the road, between two stations and two offsets."""
    x, y = road.points(np.array([s[0], s[1], s[1], s[0]]), np.array([d[0], d[0], d[1], d[1]]))
    builder.ground(x, y, colour)


def _add_road(builder: _Builder, road: Road) -> None:
    """Shoulders, asphalt, edge lines, the divider and the dashed lane lines."""
    lanes = road.lanes
    left, right = lanes.left_edge_d, lanes.right_edge_d
    _strip(builder, road, left + 1.5, right - 1.5, _SHOULDER)
    _strip(builder, road, left, right, _ASPHALT)
    for d in (left - 0.2, right + 0.2):
        _strip(builder, road, d + 0.1, d - 0.1, _WHITE)
    dashed = [lanes.divider_d - 3.5 * (i + 1) for i in range(lanes.left + lanes.right)]
    dashed += [left - 3.5 * (i + 1) for i in range(lanes.oncoming - 1)]
    if lanes.oncoming:
        _strip(builder, road, lanes.divider_d + 0.15, lanes.divider_d - 0.15, _YELLOW)
    for d in dashed:
        for s in np.arange(-9.0, 72.0, 9.0):
            _patch(builder, road, (s, s + 4.0), (d + 0.13, d - 0.13), _WHITE)


def _add_marks(builder: _Builder, scene: Scene) -> None:
    """Cross road, stop line and crosswalk."""
    road, marks = scene.road, scene.marks
    left, right = road.lanes.left_edge_d, road.lanes.right_edge_d
    if marks.junction is not None:
        _patch(builder, road, marks.junction, (left + 60.0, right - 60.0), _ASPHALT)
    if marks.stop_line is not None:
        line = (marks.stop_line, marks.stop_line + 0.7)
        _patch(builder, road, line, (road.lanes.divider_d, right), _WHITE)
    if marks.crosswalk is not None:
        stripe = (marks.crosswalk - 1.3, marks.crosswalk + 1.3)
        for d in np.arange(right + 0.5, left - 0.6, 1.2):
            _patch(builder, road, stripe, (d, d + 0.6), _WHITE)


def _add_shadow(builder: _Builder, item: Item) -> None:
    """A dark patch under a vehicle, which moves with it."""
    length, width, _ = VEHICLE_SIZES[item.kind]
    along = np.array([-0.5, 0.5, 0.5, -0.5]) * (length + 0.3)
    across = np.array([-0.5, -0.5, 0.5, 0.5]) * (width + 0.3)
    cos, sin = math.cos(item.yaw), math.sin(item.yaw)
    builder.ground(
        item.x + cos * along - sin * across, item.y + sin * along + cos * across, (45, 45, 48), item
    )


def draw_picture(scene: Scene, camera_index: int, time_s: float) -> npt.NDArray[np.uint8]:
    """Draw what one camera sees.

    Args:
        scene: the scene.
        camera_index: the dataset's index of the camera, one of `CAMERA_MOUNTS`.
        time_s: seconds after t0. Other vehicles keep their acceleration: meant for about a second around t0.

    Returns:
        uint8 [128, 256, 3], RGB.

    Raises:
        ValueError: the world has no such camera.
    """
    if camera_index not in CAMERA_MOUNTS:
        known = ", ".join(f"{i} ({CAMERAS[i]})" for i in CAMERA_MOUNTS)
        raise ValueError(f"the world has no camera {camera_index}; it has {known}")
    camera, mesh = CAMERA_MOUNTS[camera_index], build_mesh(scene)
    points = _to_camera(mesh, camera, scene.track.pose(time_s), time_s)
    image = _backdrop(scene)
    _draw(image, mesh, points, camera.focal)
    return np.array(image)


def frames(scene: Scene) -> npt.NDArray[np.uint8]:
    """The pictures of a prompt, in its order: cameras 0, 1, 2, 6, each at t0 - 0.3 s ... t0.

    Returns:
        uint8 [4 cameras, 4 frames, 128, 256, 3], RGB.
    """
    result = np.empty((len(DEFAULT_CAMERAS), FRAMES_PER_CAMERA, HEIGHT, WIDTH, 3), np.uint8)
    for row, camera_index in enumerate(DEFAULT_CAMERAS):
        for column, time_s in enumerate(FRAME_TIMES_S):
            result[row, column] = draw_picture(scene, camera_index, time_s)
    return result


def window(scene: Scene) -> Window:
    """A scene as the window that a clip of it would give, without files or a video codec between."""
    history_xyz, history_rot = scene.history()
    future_xyz, future_rot = scene.future()
    return Window(
        scene.clip_id,
        DEFAULT_T0_US,
        DEFAULT_CAMERAS,
        frames(scene),
        history_xyz,
        history_rot,
        future_xyz,
        future_rot,
    )


def _to_camera(mesh: Mesh, camera: Camera, pose: tuple[float, float, float], time_s: float) -> Floats:
    """The vertices [3, vertices] as (right, down, depth) in metres in the camera's frame at a time."""
    x, y, yaw = pose
    cos, sin = math.cos(yaw), math.sin(yaw)
    x, y = x + cos * camera.x - sin * camera.y, y + sin * camera.x + cos * camera.y
    cos, sin = math.cos(yaw + camera.yaw), math.sin(yaw + camera.yaw)
    place = mesh.vertices[:, :2] + mesh.velocity * time_s + mesh.acceleration * (time_s * time_s / 2)
    turn = np.array([[sin, -cos], [cos, sin]])
    points = np.empty((3, len(place)))
    points[0::2] = turn @ (place - (x, y)).T
    points[1] = camera.z - mesh.vertices[:, 2]
    return points


def _backdrop(scene: Scene) -> Image.Image:
    """Sky and ground, which meet at the horizon in the picture's middle."""
    light = scene.look.brightness
    sky, ground = (
        tuple(round(value * light) for value in colour) for colour in (scene.look.sky, scene.look.ground)
    )
    image = Image.new("RGB", (WIDTH, HEIGHT), sky)
    image.paste(ground, (0, HEIGHT // 2, WIDTH, HEIGHT))
    return image


def _draw(image: Image.Image, mesh: Mesh, points: Floats, focal: float) -> None:
    """Paint the polygons that the picture shows."""
    outlines, ends = _outlines(mesh, points, focal)
    starts = np.append(0, ends[:-1])
    order = np.flatnonzero(_shown(mesh, points, focal) & (ends - starts > 2))
    order = order[np.argsort(-_drawing_key(mesh, points)[order], kind="stable")]
    corners = outlines.ravel().tolist()
    draw, colours = ImageDraw.Draw(image), mesh.colours
    for i, start, end in zip(
        order.tolist(), (2 * starts[order]).tolist(), (2 * ends[order]).tolist(), strict=True
    ):
        draw.polygon(corners[start:end], fill=colours[i])


def _outlines(mesh: Mesh, points: Floats, focal: float) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Cut all polygons at the near plane and project them.

    Each vertex has two slots: itself, if it lies before the plane, and the cut of the edge to the next
    vertex, if that edge crosses the plane.

    Returns:
        Pixels (x, y) [slots in use, 2], and where each polygon's slots end [polygons].
    """
    slots = np.empty((points.shape[1], 2, 3))
    slots[:, 0] = points.T
    front = points[2] > _NEAR_M
    used = np.empty((points.shape[1], 2), np.bool_)
    used[:, 0] = front
    used[:, 1] = front != front[mesh.following]
    crossing = np.flatnonzero(used[:, 1])
    here, there = slots[crossing, 0], slots[mesh.following[crossing], 0]
    part = (_NEAR_M - here[:, 2]) / (there[:, 2] - here[:, 2])
    slots[crossing, 1] = here + part[:, None] * (there - here)
    kept = slots[used]
    pixels = kept[:, :2] * (focal / kept[:, 2:]) + (WIDTH / 2, HEIGHT / 2)
    return pixels, np.cumsum(np.add.reduceat(used.sum(1), mesh.starts))


def _shown(mesh: Mesh, points: Floats, focal: float) -> npt.NDArray[np.bool_]:
    """Which polygons [polygons] can show: wholly in front, within the picture's sides and facing the camera.

    Those which the near plane cuts always count as shown.
    """
    right, down, depth = points
    scale = focal / np.maximum(depth, _NEAR_M)
    x, y = right * scale, down * scale
    shown = (np.minimum.reduceat(x, mesh.starts) < WIDTH / 2) & (
        np.maximum.reduceat(x, mesh.starts) > -WIDTH / 2
    )
    area = np.add.reduceat(x * y[mesh.following] - x[mesh.following] * y, mesh.starts)
    shown &= np.where(mesh.one_sided, -area, np.abs(area)) > _SMALLEST_AREA
    return shown | (np.minimum.reduceat(depth, mesh.starts) <= _NEAR_M)


def _drawing_key(mesh: Mesh, points: Floats) -> Floats:
    """How early each polygon is drawn, highest first: ground in its order, then parts by their distance."""
    squared = points[0] ** 2 + points[2] ** 2
    key = np.minimum.reduceat(squared, mesh.part_starts)
    key[: mesh.ground_parts] = 1e9 - np.arange(mesh.ground_parts)
    return key[mesh.part]
