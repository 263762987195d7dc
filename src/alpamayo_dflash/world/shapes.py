"""The shapes of things: lists of coloured polygons in metres, each thing in its own frame.

A solid's frame has x forward, y left, z up, with the origin on the ground under its middle. A flat thing
(person, sign, tree) lies in the plane (u right, z up) and is turned towards the ego's place at t0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alpamayo_dflash.world.scene import Colour, Item

# A named paint is looked up in the item: its body colour, or a lamp that is on or off.
Paint = Colour | str
Span = tuple[float, float]
Point = tuple[float, float, float]

GLASS: Colour = (35, 45, 60)
PANES: Colour = (80, 95, 115)
DARK: Colour = (30, 30, 32)
LAMP_DARK: Colour = (75, 12, 12)
LAMP_RED: Colour = (255, 20, 20)
LAMP_ORANGE: Colour = (255, 150, 0)
SIGNAL_RED: Colour = (255, 0, 0)
SIGNAL_GREEN: Colour = (0, 255, 90)
HI_VIS: Colour = (195, 255, 40)
SPOKES: Colour = (170, 170, 170)
SKIN: Colour = (220, 170, 135)


@dataclass(frozen=True)
class Face:
    """A polygon: its corners, its paint, a shade for its direction, and whether it shines by itself."""

    points: tuple[Point, ...]
    paint: Paint
    shade: float = 1.0
    shines: bool = False


Part = tuple[Face, ...]  # faces that are drawn in order, as one thing


def _box(x: Span, half: float, z: Span, paint: Paint) -> list[Face]:
    """The five visible sides of a box, corners anticlockwise as seen from outside."""
    top = ((x[0], -half, z[1]), (x[1], -half, z[1]), (x[1], half, z[1]), (x[0], half, z[1]))
    return [
        _rear(x[0], (-half, half), z, paint, 0.85),
        _front(x[1], (-half, half), z, paint, 0.8),
        *_sides(half, x, z, paint, 0.7),
        Face(top, paint),
    ]


def _rear(x: float, y: Span, z: Span, paint: Paint, shade: float = 1.0, *, shines: bool = False) -> Face:
    corners = ((x, y[1], z[0]), (x, y[0], z[0]), (x, y[0], z[1]), (x, y[1], z[1]))
    return Face(corners, paint, shade, shines)


def _front(x: float, y: Span, z: Span, paint: Paint, shade: float = 1.0) -> Face:
    return Face(((x, y[0], z[0]), (x, y[1], z[0]), (x, y[1], z[1]), (x, y[0], z[1])), paint, shade)


def _sides(half: float, x: Span, z: Span, paint: Paint, shade: float = 1.0) -> list[Face]:
    """The same rectangle on the left and on the right side, `half` metres from the middle."""
    left = ((x[1], half, z[0]), (x[0], half, z[0]), (x[0], half, z[1]), (x[1], half, z[1]))
    right = ((x[0], -half, z[0]), (x[1], -half, z[0]), (x[1], -half, z[1]), (x[0], -half, z[1]))
    return [Face(left, paint, shade), Face(right, paint, shade)]


def _tail(x: float, y: Span, z: Span, turn: float) -> list[Face]:
    """Brake lamps on both sides, with the turn signals under them down to the height `turn`."""
    other, low = (-y[1], -y[0]), (turn, z[0])
    return [
        _rear(x, y, z, "brake", shines=True),
        _rear(x, other, z, "brake", shines=True),
        _rear(x, y, low, "turn_left", shines=True),
        _rear(x, other, low, "turn_right", shines=True),
    ]


def _wheels(half: float, length: float) -> list[Face]:
    """Dark wheels on both sides."""
    faces = []
    for x in (-length / 2 + 0.9, length / 2 - 0.9):
        faces += _sides(half + 0.02, (x - 0.35, x + 0.35), (0.0, 0.65), DARK)
    return faces


def _car() -> tuple[Part, ...]:
    x, half = -2.2, 0.9
    return (
        (
            *_box((x, 2.2), half, (0.25, 0.95), "body"),
            *_wheels(half, 4.4),
            _front(2.21, (-0.8, 0.8), (0.6, 0.8), (230, 230, 220)),
            *_tail(x - 0.02, (0.45, 0.9), (0.58, 0.93), 0.3),
            *_box((x + 0.5, 0.9), 0.75, (0.95, 1.5), "body"),
            _rear(x + 0.48, (-0.65, 0.65), (1.0, 1.42), GLASS),
            _rear(x + 0.46, (-0.3, 0.3), (0.96, 1.08), "brake", shines=True),
            _front(0.92, (-0.65, 0.65), (1.0, 1.42), GLASS),
            *_sides(0.77, (x + 0.7, 0.7), (1.0, 1.4), GLASS),
        ),
    )


def _van() -> tuple[Part, ...]:
    x, half = -2.7, 1.0
    return (
        (
            *_box((x, 2.7), half, (0.3, 2.4), "body"),
            *_wheels(half, 5.4),
            _rear(x - 0.01, (0.1, 0.85), (1.5, 2.2), GLASS),
            _rear(x - 0.01, (-0.85, -0.1), (1.5, 2.2), GLASS),
            *_tail(x - 0.02, (0.5, 1.0), (0.75, 1.3), 0.4),
            _front(2.71, (-0.85, 0.85), (1.4, 2.2), GLASS),
            *_sides(half + 0.01, (1.2, 2.5), (1.4, 2.1), GLASS),
        ),
    )


def _truck() -> tuple[Part, ...]:
    x, half = -4.0, 1.25
    return (
        (
            *_box((x, 2.0), 1.15, (0.35, 0.95), DARK),
            *_wheels(1.15, 8.0),
            *_box((x, 1.8), half, (0.95, 3.6), "body"),
            _rear(x - 0.01, (-0.05, 0.05), (1.0, 3.55), (70, 70, 70)),
            *_tail(x - 0.02, (0.5, 1.2), (0.5, 0.95), 0.15),
        ),
        (
            *_box((2.0, 4.0), 1.2, (0.4, 2.8), (70, 85, 120)),
            _front(4.01, (-1.05, 1.05), (1.7, 2.6), GLASS),
            *_sides(1.21, (2.7, 3.8), (1.7, 2.5), GLASS),
        ),
    )


def _bus() -> tuple[Part, ...]:
    x, half = -5.5, 1.25
    return (
        (
            *_box((x, 5.5), half, (0.35, 3.1), "body"),
            *_wheels(half, 11.0),
            _rear(x - 0.01, (-1.1, 1.1), (1.75, 2.85), GLASS),
            _rear(x - 0.01, (-0.4, 0.4), (0.6, 1.3), DARK),
            *_tail(x - 0.02, (0.6, 1.25), (0.85, 1.4), 0.45),
            _front(5.51, (-1.1, 1.1), (1.3, 2.8), GLASS),
            *_sides(half + 0.01, (-5.2, 5.2), (1.5, 2.6), GLASS),
        ),
    )


def _building() -> tuple[Part, ...]:
    faces = _box((-6.0, 6.0), 5.0, (0.0, 8.0), "body")
    for windows in ((1.5, 3.1), (4.5, 6.1)):
        faces += _sides(5.02, (-5.2, 5.2), windows, PANES)
        faces.append(_rear(-6.02, (-4.2, 4.2), windows, PANES))
    return (tuple(faces),)


_SOLIDS = {"car": _car, "van": _van, "truck": _truck, "bus": _bus, "building": _building}


def _flat(points: list[tuple[float, float]], paint: Paint, shines: bool = False) -> Face:
    return Face(tuple((0.0, -u, z) for u, z in points), paint, 1.0, shines)


def _panel(u: Span, z: Span, paint: Paint) -> Face:
    return _flat([(u[0], z[0]), (u[1], z[0]), (u[1], z[1]), (u[0], z[1])], paint)


def _disc(u: float, z: float, radius: float, paint: Paint, shines: bool = False) -> Face:
    """A regular octagon."""
    angles = [(i + 0.5) * math.pi / 4 for i in range(8)]
    return _flat([(u + radius * math.cos(a), z + radius * math.sin(a)) for a in angles], paint, shines)


def _pedestrian(view: str) -> list[Face]:
    stride = 0.0 if view == "back" else 0.3
    return [
        _flat([(-0.2 - stride, 0.0), (-0.02 - stride, 0.0), (0.02, 0.9), (-0.2, 0.9)], (45, 45, 60)),
        _flat([(0.02 + stride, 0.0), (0.2 + stride, 0.0), (0.2, 0.9), (-0.02, 0.9)], (55, 55, 70)),
        _panel((-0.27, 0.27), (0.85, 1.5), "body"),
        _disc(0.0, 1.68, 0.17, SKIN),
    ]


def _cyclist(view: str) -> list[Face]:
    if view == "back":
        return [
            _panel((-0.07, 0.07), (0.0, 0.7), DARK),
            _panel((-0.25, -0.08), (0.3, 0.95), (50, 50, 70)),
            _panel((0.08, 0.25), (0.3, 0.95), (50, 50, 70)),
            _panel((-0.38, 0.38), (1.0, 1.08), DARK),
            _flat([(-0.24, 0.9), (0.24, 0.9), (0.33, 1.5), (-0.33, 1.5)], HI_VIS),
            _disc(0.0, 1.68, 0.18, (240, 240, 240)),
        ]
    ahead = -1.0 if view == "left" else 1.0
    frame = [(-0.6, 0.34), (-0.1, 0.85), (0.5, 0.8), (0.6, 0.4), (0.45, 0.68), (0.0, 0.7)]
    leg = [(-0.2, 0.85), (0.05, 0.9), (0.15, 0.25), (-0.02, 0.25)]
    body = [(-0.3, 0.85), (0.05, 0.9), (0.45, 1.4), (0.15, 1.55)]
    arm = [(0.3, 1.35), (0.42, 1.3), (0.6, 0.95), (0.5, 0.92)]
    outlines: list[tuple[list[tuple[float, float]], Paint]] = [
        (frame, DARK),
        (leg, (50, 50, 70)),
        (body, HI_VIS),
        (arm, HI_VIS),
    ]
    wheels = [
        _disc(u, 0.36, radius, paint)
        for u in (-0.58, 0.58)
        for radius, paint in ((0.38, DARK), (0.24, SPOKES))
    ]
    rider = [_flat([(ahead * u, z) for u, z in outline], paint) for outline, paint in outlines]
    return [*wheels, *rider, _disc(ahead * 0.4, 1.68, 0.18, (240, 240, 240))]


def _signal_head(z: float) -> list[Face]:
    """Three lamps in a dark housing with a pale border, from the height z up."""
    return [
        _panel((-0.75, 0.75), (z - 0.1, z + 3.4), (225, 225, 215)),
        _panel((-0.65, 0.65), (z, z + 3.3), (18, 18, 20)),
        _disc(0.0, z + 2.7, 0.52, "signal_red", shines=True),
        _disc(0.0, z + 1.65, 0.4, (50, 42, 15)),
        _disc(0.0, z + 0.6, 0.52, "signal_green", shines=True),
    ]


def _signal(_: str) -> list[Face]:
    return [_panel((-0.12, 0.12), (0.0, 1.1), DARK), *_signal_head(1.1)]


def _signal_overhead(_: str) -> list[Face]:
    return [_panel((0.0, 8.0), (8.0, 8.2), DARK), *_signal_head(4.7)]


def _stop_sign(_: str) -> list[Face]:
    return [
        _panel((-0.07, 0.07), (0.0, 2.2), (130, 130, 130)),
        _disc(0.0, 2.5, 0.95, (245, 245, 245)),
        _disc(0.0, 2.5, 0.85, (205, 0, 15)),
        _panel((-0.62, 0.62), (2.35, 2.68), (245, 245, 245)),
    ]


def _cone(_: str) -> list[Face]:
    return [
        _panel((-0.36, 0.36), (0.0, 0.1), "body"),
        _flat([(-0.28, 0.1), (0.28, 0.1), (0.09, 1.1), (-0.09, 1.1)], "body"),
        _flat([(-0.21, 0.45), (0.21, 0.45), (0.16, 0.7), (-0.16, 0.7)], (245, 245, 245)),
    ]


def _chevron(turn: float) -> list[Face]:
    arrow = [(-0.45, 0.8), (-0.05, 0.8), (0.45, 1.4), (-0.05, 2.0), (-0.45, 2.0), (0.05, 1.4)]
    return [
        _panel((-0.06, 0.06), (0.0, 0.7), (130, 130, 130)),
        _panel((-0.65, 0.65), (0.7, 2.1), "body"),
        _flat([(u * turn, z) for u, z in arrow], DARK),
    ]


def _triangle(_: str) -> list[Face]:
    return [
        _flat([(-0.45, 0.05), (0.45, 0.05), (0.0, 0.85)], LAMP_RED),
        _flat([(-0.22, 0.18), (0.22, 0.18), (0.0, 0.6)], (235, 235, 235)),
    ]


def _tree(_: str) -> list[Face]:
    crown = [(-1.2, 1.8), (1.2, 1.8), (2.0, 3.4), (1.2, 5.4), (-1.2, 5.4), (-2.0, 3.4)]
    return [_panel((-0.2, 0.2), (0.0, 2.0), (90, 70, 50)), _flat(crown, "body")]


def _post(_: str) -> list[Face]:
    return [_panel((-0.1, 0.1), (0.0, 6.5), "body")]


_FLATS = {
    "pedestrian": _pedestrian,
    "cyclist": _cyclist,
    "signal": _signal,
    "signal_overhead": _signal_overhead,
    "stop_sign": _stop_sign,
    "cone": _cone,
    "chevron_left": lambda _: _chevron(-1.0),
    "chevron_right": lambda _: _chevron(1.0),
    "triangle": _triangle,
    "tree": _tree,
    "post": _post,
}


@dataclass(frozen=True, eq=False)
class ItemShape:
    """A thing's polygons as arrays.

    Attributes:
        solid: whether faces are seen from outside only, and the thing keeps its own heading.
        vertices: [vertices, 3] metres.
        counts: corners of each face.
        faces: the faces.
        part_ends: the number of faces up to the end of each part; parts are sorted by distance.
    """

    solid: bool
    vertices: npt.NDArray[np.float64]
    counts: tuple[int, ...]
    faces: tuple[Face, ...]
    part_ends: tuple[int, ...]


@functools.cache
def shape(kind: str, view: str = "") -> ItemShape:
    """The shape of a kind of thing; `view` matters for persons only."""
    solid = kind in _SOLIDS
    parts = _SOLIDS[kind]() if solid else (tuple(_FLATS[kind](view)),)
    faces = tuple(face for part in parts for face in part)
    ends = tuple(np.cumsum([len(part) for part in parts]).tolist())
    vertices = np.array([point for face in faces for point in face.points])
    return ItemShape(solid, vertices, tuple(len(face.points) for face in faces), faces, ends)


def placed(item: Item) -> npt.NDArray[np.float64]:
    """The vertices [vertices, 3] of an item's shape in the road frame, at its place at t0."""
    form = shape(item.kind, item.view)
    yaw = item.yaw if form.solid else math.atan2(item.y, item.x)
    cos, sin = math.cos(yaw) * item.size, math.sin(yaw) * item.size
    turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, item.size]])
    vertices: npt.NDArray[np.float64] = form.vertices @ turn + np.array([item.x, item.y, 0.0])
    return vertices


def colour_of(paint: Paint, item: Item) -> Colour:
    """The colour of a paint on an item, by its body colour and its lights."""
    if not isinstance(paint, str):
        return paint
    lights = item.lights
    match paint:
        case "body":
            return item.colour
        case "brake":
            return LAMP_RED if lights == "brake" else LAMP_DARK
        case "turn_left":
            return LAMP_ORANGE if lights in ("hazard", "left") else DARK
        case "turn_right":
            return LAMP_ORANGE if lights in ("hazard", "right") else DARK
        case "signal_red":
            return SIGNAL_RED if lights == "red" else (60, 14, 14)
        case "signal_green":
            return SIGNAL_GREEN if lights == "green" else (10, 50, 25)
    raise ValueError(f"paint {paint!r} is unknown")
