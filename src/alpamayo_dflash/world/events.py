"""What may happen in a scene: each event places signals, lanes and traffic, and decides what the ego does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from alpamayo_dflash.world.facts import (
    EVENT_SHARES,
    PERSONS,
    SIDED,
    VEHICLES,
    WITH_PERSON,
    WITH_VEHICLE,
    Event,
    Facts,
    Side,
)
from alpamayo_dflash.world.kinematics import Shift, Sway, drive
from alpamayo_dflash.world.road import HALF_LANE_M, LANE_WIDTH_M, Lanes, Road, build_road
from alpamayo_dflash.world.scene import (
    VEHICLE_SIZES,
    Colour,
    Item,
    Knots,
    Lights,
    Look,
    RoadMarks,
    Scene,
    View,
    clip_id_of,
)

FRONT_M = 3.7  # from the ego's origin to its front bumper
MAX_SPEED = 18.0
_VEHICLE_SHARES = (0.55, 0.2, 0.15, 0.1)  # of VEHICLES
_LEFT_SHARE = 0.45  # of the sides

# No reds and no oranges: those belong to lights, signs and cones.
_PAINTS: dict[str, tuple[Colour, ...]] = {
    "car": ((225, 225, 225), (150, 155, 160), (40, 42, 48), (40, 80, 160), (60, 110, 75), (190, 180, 150)),
    "van": ((235, 235, 235), (200, 205, 210), (90, 120, 150), (205, 200, 180)),
    "truck": ((240, 240, 235), (120, 150, 190), (170, 170, 165), (95, 125, 100)),
    "bus": ((235, 190, 40), (40, 110, 200), (30, 150, 120), (225, 205, 90)),
}
_CLOTHES: tuple[Colour, ...] = ((40, 50, 110), (120, 40, 90), (60, 60, 60), (90, 60, 40), (200, 200, 200))
_SKIES: tuple[Colour, ...] = ((140, 185, 235), (190, 205, 220), (170, 175, 185), (235, 200, 165))
_GROUNDS: tuple[Colour, ...] = ((95, 135, 70), (130, 130, 85), (150, 145, 135), (75, 115, 80))


def sample_scene(seed: int, facts: Facts | None = None) -> Scene:
    """Draw a scene. The same seed gives the same scene.

    Args:
        seed: not negative.
        facts: what the scene shall be about; drawn by `EVENT_SHARES` if left out.
    """
    rng = np.random.default_rng(seed)
    drawn = sample_facts(rng)
    plan = _Plan(rng, facts or drawn)
    _EVENTS[plan.facts.event](plan)
    _add_traffic(plan)
    _add_surroundings(plan)
    road = plan.road
    sway = Sway(rng.uniform(0.02, 0.12), rng.uniform(45.0, 80.0), rng.uniform(0.0, 2 * np.pi))
    return Scene(
        seed,
        clip_id_of(seed),
        plan.facts,
        road,
        drive(road, _past(rng, plan.speed) + plan.future, plan.shifts, sway),
        tuple(plan.items),
        plan.marks,
        Look(rng.uniform(0.6, 1.0), _pick(rng, _SKIES), _pick(rng, _GROUNDS)),
    )


def sample_facts(rng: np.random.Generator) -> Facts:
    """Draw an event by `EVENT_SHARES`, its side and its actor."""
    events = tuple(EVENT_SHARES)
    event = events[rng.choice(len(events), p=tuple(EVENT_SHARES.values()))]
    side: Side = ""
    if event in SIDED:
        side = "left" if rng.random() < _LEFT_SHARE else "right"
    actor = ""
    if event in WITH_VEHICLE:
        actor = VEHICLES[rng.choice(len(VEHICLES), p=_VEHICLE_SHARES)]
    elif event in WITH_PERSON:
        actor = PERSONS[rng.integers(len(PERSONS))]
    return Facts(event, side, actor)


@dataclass
class _Plan:
    """A scene in the making: the event fills it, then traffic and surroundings are added."""

    rng: np.random.Generator
    facts: Facts
    road: Road = field(init=False)
    speed: float = 0.0  # at t0
    future: Knots = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    marks: RoadMarks = field(default_factory=RoadMarks)

    @property
    def sign(self) -> float:
        """1 where the event's side is the left, -1 where it is the right."""
        return 1.0 if self.facts.side == "left" else -1.0

    def uniform(self, low: float, high: float) -> float:
        """A number between two."""
        return float(self.rng.uniform(low, high))

    def lay_road(self, *choices: Lanes) -> None:
        """Choose among lanes; some roads bend a little."""
        bend = self.uniform(-1 / 500, 1 / 500) if self.rng.random() < 0.4 else 0.0
        self.road = build_road(choices[self.rng.integers(len(choices))], base_curvature=bend)

    def add(
        self,
        kind: str,
        s: float,
        d: float,
        *,
        turn: float = 0.0,
        speed: float = 0.0,
        across: float = 0.0,
        acceleration: float = 0.0,
        colour: Colour | None = None,
        lights: Lights = "off",
        view: View = "",
        size: float = 1.0,
    ) -> None:
        """Place an item at road coordinates; speeds are along and across the road there."""
        x, y = self.road.point(s, d)
        heading = float(self.road.heading_at(np.array([s]))[0])
        cos, sin = np.cos(heading), np.sin(heading)
        self.items.append(
            Item(
                kind,
                x,
                y,
                heading + turn,
                (speed * cos - across * sin, speed * sin + across * cos),
                (acceleration * cos, acceleration * sin),
                colour or _pick(self.rng, _PAINTS.get(kind, _CLOTHES)),
                lights,
                view,
                size,
            )
        )

    def add_vehicle(self, gap: float, d: float = 0.0, **how: float | Lights) -> None:
        """Place the event's vehicle with its rear `gap` metres before the ego's front bumper."""
        length = VEHICLE_SIZES[self.facts.actor][0]
        self.add(self.facts.actor, FRONT_M + gap + length / 2, d, **how)  # type: ignore[arg-type]

    def stop_after(self, distance: float) -> None:
        """Brake to a stand after `distance` metres, evenly, after a short delay."""
        delay = min(0.4, 0.3 * distance / self.speed)
        self.future = [(delay, self.speed), (delay + 2 * (distance / self.speed - delay), 0.0), (9.0, 0.0)]

    def nudge(self, begin: float, end: float) -> None:
        """Move away from the event's side before `begin` and back after `end` (metres from the origin)."""
        length = max(9.0, 1.8 * self.speed)
        start = max(0.3, begin - length - self.uniform(0.0, 2.0))
        amount = -self.sign * self.uniform(0.8, 1.2)
        back = max(end, start + length) + self.uniform(0.5, 2.0)
        self.shifts = [Shift(start, length, amount), Shift(back, length, -amount)]
        self.future = [(0.3, self.speed), (2.5, self.speed * self.uniform(0.8, 0.95)), (9.0, self.speed)]


def _pick(rng: np.random.Generator, colours: tuple[Colour, ...]) -> Colour:
    return colours[rng.integers(len(colours))]


def _past(rng: np.random.Generator, speed: float) -> Knots:
    """Speeds up to t0, drawn alike for every event."""
    if speed == 0.0:
        if rng.random() < 0.65:
            return [(-6.0, 0.0), (0.0, 0.0)]
        stopped = -rng.uniform(0.5, 1.2)
        return [(stopped - 4.0, rng.uniform(3.0, 6.0)), (stopped, 0.0), (0.0, 0.0)]
    change = rng.uniform(-0.6, 0.5)
    before = float(np.clip(speed - 3.0 * change, 0.5, MAX_SPEED))
    return [(-6.0, before), (-3.0, before), (0.0, speed)]


def _hold(plan: _Plan, change: tuple[float, float]) -> None:
    """Drive on, with a small change of speed over four seconds."""
    plan.future = [(0.5, plan.speed), (4.5, min(MAX_SPEED, plan.speed + plan.uniform(*change)))]


# Lanes with nothing beside the ego's lane on the right, on the left, on both.
_FREE_RIGHT = (Lanes(0, 0, 1), Lanes(0, 0, 2), Lanes(1, 0, 1), Lanes(1, 0, 0))
_FREE_LEFT = (Lanes(0, 1, 0), Lanes(0, 1, 0), Lanes(0, 2, 0))
_ANY = (*_FREE_RIGHT, Lanes(0, 1, 0), Lanes(0, 1, 1), Lanes(1, 1, 0))


def _edge_lanes(plan: _Plan) -> tuple[Lanes, ...]:
    """Roads whose edge, on the event's side, is the ego lane's own."""
    return _FREE_LEFT if plan.facts.side == "left" else _FREE_RIGHT


def _lane_beside(plan: _Plan) -> tuple[Lanes, ...]:
    """Roads with a lane of the ego's direction on the event's side and the road's edge on the other."""
    return (Lanes(1, 0, 0), Lanes(1, 0, 1)) if plan.facts.side == "left" else (Lanes(0, 1, 0), Lanes(0, 2, 0))


def _lead_steady(plan: _Plan) -> None:
    plan.lay_road(*_ANY)
    plan.speed = plan.uniform(3.0, 16.0)
    gap = min(30.0, plan.uniform(6.0, 10.0) + plan.uniform(0.5, 1.3) * plan.speed)
    plan.add_vehicle(gap, plan.uniform(-0.2, 0.2), speed=plan.speed + plan.uniform(-0.5, 0.5))
    _hold(plan, (-1.0, 1.0))


def _lead_slowing(plan: _Plan) -> None:
    plan.lay_road(*_ANY)
    plan.speed = plan.uniform(5.0, 14.0)
    gap = plan.uniform(14.0, 17.0) + plan.uniform(0.2, 0.6) * plan.speed
    speed = plan.speed - plan.uniform(2.5, min(6.0, plan.speed - 0.5))
    plan.add_vehicle(
        gap, plan.uniform(-0.2, 0.2), speed=speed, acceleration=-plan.uniform(1.0, 2.5), lights="brake"
    )
    slow = plan.speed * plan.uniform(0.25, 0.5)
    plan.future = [(0.3, plan.speed), (max(3.0, (plan.speed - slow) / 2.8), slow), (9.0, slow)]


def _lead_stopped(plan: _Plan) -> None:
    plan.lay_road(*_ANY)
    if plan.rng.random() < 0.35:
        plan.future = [(9.0, 0.0)]
        plan.add_vehicle(plan.uniform(2.0, 4.5), plan.uniform(-0.2, 0.2), lights="brake")
        return
    plan.speed = plan.uniform(1.2, 4.8)
    distance = min(plan.speed**2 / (2 * plan.uniform(1.4, 2.4)) + 0.4 * plan.speed, 2.8 * plan.speed, 8.0)
    plan.stop_after(distance)
    plan.add_vehicle(distance + plan.uniform(2.0, 3.0), plan.uniform(-0.2, 0.2), lights="brake")


def _approach(plan: _Plan, fastest: float, farthest: float, standing: float) -> float:
    """Stand at a stop line or brake to a stand before it; returns where the line is."""
    if plan.rng.random() < standing:
        plan.future = [(9.0, 0.0)]
        return FRONT_M + plan.uniform(0.8, 2.5)
    plan.speed = plan.uniform(1.5, fastest)
    hardest = plan.speed**2 / 6.0 + 0.4 * plan.speed + 0.5
    distance = plan.uniform(hardest, max(hardest, min(farthest, 3.0 * plan.speed)))
    plan.stop_after(distance)
    return FRONT_M + distance + plan.uniform(0.5, 1.5)


def _add_signals(plan: _Plan, line: float, lights: Lights) -> None:
    """A traffic light beyond the stop line: one head on a pole at the right, one above the road."""
    at = max(line + plan.uniform(8.0, 13.0), 23.0)
    plan.add("signal", at, -HALF_LANE_M - 1.4, lights=lights, colour=(60, 60, 62))
    plan.add("signal_overhead", at + 0.5, plan.uniform(0.3, 1.2), lights=lights, colour=(60, 60, 62))
    crosswalk = line + 2.2 if plan.rng.random() < 0.4 else None
    plan.marks = RoadMarks(line, crosswalk, (line + 4.5, at - 1.5) if at - line > 8.5 else None)


def _red_light(plan: _Plan) -> None:
    plan.lay_road(*_FREE_RIGHT)
    _add_signals(plan, _approach(plan, 10.5, 26.0, 0.25), "red")


def _green_light_start(plan: _Plan) -> None:
    plan.lay_road(*_FREE_RIGHT)
    _add_signals(plan, FRONT_M + plan.uniform(0.8, 2.5), "green")
    begin, top = plan.uniform(0.1, 0.6), plan.uniform(7.0, 10.0)
    plan.future = [(begin, 0.0), (begin + top / plan.uniform(1.4, 2.2), top), (9.0, top)]


def _green_light_through(plan: _Plan) -> None:
    plan.lay_road(*_FREE_RIGHT)
    plan.speed = plan.uniform(3.0, 13.0)
    _add_signals(plan, FRONT_M + plan.uniform(6.0, 26.0), "green")
    _hold(plan, (-0.3, 1.0))


def _stop_sign(plan: _Plan) -> None:
    plan.lay_road(*_FREE_RIGHT)
    line = _approach(plan, 9.5, 20.0, 0.2)
    plan.add("stop_sign", line + plan.uniform(0.8, 2.0), -HALF_LANE_M - 1.2)
    plan.marks = RoadMarks(stop_line=line, junction=(line + 3.0, line + 11.0))


def _clear_road(plan: _Plan) -> None:
    plan.lay_road(*_ANY)
    plan.speed = plan.uniform(3.0, 16.0)
    _hold(plan, (-0.5, 2.0))


def _parked_vehicle(plan: _Plan) -> None:
    plan.lay_road(*_edge_lanes(plan))
    plan.speed = plan.uniform(3.0, 10.5)
    length, width, _ = VEHICLE_SIZES[plan.facts.actor]
    gap = max(7.0, 1.6 * plan.speed) + plan.uniform(0.0, 5.0)
    plan.add_vehicle(gap, plan.sign * (HALF_LANE_M - plan.uniform(0.45, 0.9) + width / 2))
    plan.nudge(FRONT_M + gap, FRONT_M + gap + length)


def _cones(plan: _Plan) -> None:
    plan.lay_road(*_edge_lanes(plan))
    plan.speed = plan.uniform(3.0, 10.5)
    first = FRONT_M + max(5.0, 1.4 * plan.speed) + plan.uniform(0.0, 4.0)
    spacing, count = plan.uniform(2.0, 2.8), int(plan.rng.integers(5, 8))
    inside = plan.uniform(0.3, 0.7)
    for i in range(count):
        reach = inside * min(1.0, (i + 1) / 3)
        plan.add("cone", first + i * spacing, plan.sign * (HALF_LANE_M - reach), colour=(255, 110, 0))
    plan.nudge(first, first + (count - 1) * spacing)


def _roadside_person(plan: _Plan) -> None:
    plan.lay_road(*_edge_lanes(plan))
    plan.speed = plan.uniform(3.0, 10.0)
    at = FRONT_M + max(5.0, 1.3 * plan.speed) + plan.uniform(0.0, 4.0)
    walking = plan.facts.actor == "pedestrian"
    speed = plan.uniform(0.8, 1.5) if walking else plan.uniform(1.5, 3.0)
    plan.add(plan.facts.actor, at, plan.sign * plan.uniform(1.3, 1.75), speed=speed, view="back")
    plan.nudge(at, at + 6.0)


def _crossing_person(plan: _Plan) -> None:
    plan.lay_road(*_ANY)
    plan.speed = plan.uniform(2.0, 9.0)
    distance = max(2.0, plan.speed**2 / (2 * plan.uniform(1.8, 2.8)) + 0.4 * plan.speed)
    at = FRONT_M + distance + plan.uniform(2.0, 3.5)
    walking = plan.facts.actor == "pedestrian"
    across = plan.uniform(1.1, 1.6) if walking else plan.uniform(1.8, 2.8)
    direction = 1.0 if plan.rng.random() < 0.5 else -1.0
    plan.add(
        plan.facts.actor,
        at,
        plan.uniform(-1.0, 1.0),
        across=across * direction,
        view="left" if direction > 0 else "right",
    )
    plan.stop_after(distance)
    stopped = plan.future[1][0]
    crawl = plan.uniform(0.0, 0.6)
    plan.future[1:] = [(stopped, crawl), (stopped + plan.uniform(0.8, 1.6), crawl), (stopped + 5.0, 6.0)]
    if plan.rng.random() < 0.7:
        plan.marks = RoadMarks(crosswalk=at)


def _curve(plan: _Plan) -> None:
    choices = (Lanes(0, 0, 1), Lanes(0, 1, 0), Lanes(1, 0, 0), Lanes(0, 0, 2))
    radius = plan.uniform(20.0, 42.0)
    slow = float(np.sqrt(radius * plan.uniform(1.6, 2.3)))
    plan.speed = slow + plan.uniform(0.3, 4.0)
    start = (
        FRONT_M + plan.uniform(3.0, 6.0) + max(0.0, (plan.speed**2 - slow**2) / 4.4 + 0.3 * plan.speed - 4.0)
    )
    angle = plan.uniform(0.9, 1.8)
    plan.road = build_road(choices[plan.rng.integers(len(choices))], bend=(start, plan.sign / radius, angle))
    lanes = plan.road.lanes
    outside = lanes.right_edge_d - 1.3 if plan.sign > 0 else lanes.left_edge_d + 1.3
    for s in np.arange(start + 4.0, start + min(angle * radius, 32.0), 4.5):
        plan.add(f"chevron_{plan.facts.side}", float(s), outside, colour=(250, 210, 0))
    plan.future = [(0.3, plan.speed), (0.3 + 2 * start / (plan.speed + slow), slow), (9.0, slow)]


def _cut_in(plan: _Plan) -> None:
    plan.lay_road(*_lane_beside(plan))
    plan.speed = plan.uniform(4.0, 14.0)
    across = plan.uniform(0.8, 1.3)
    plan.add_vehicle(
        plan.uniform(5.0, 11.0),
        plan.sign * plan.uniform(1.6, 2.1),
        turn=-plan.sign * plan.uniform(0.08, 0.16),
        speed=max(3.0, plan.speed + plan.uniform(-2.0, 1.0)),
        across=-plan.sign * across,
        lights="right" if plan.sign > 0 else "left",
    )
    plan.future = [(0.3, plan.speed), (2.3, plan.speed * plan.uniform(0.7, 0.88)), (7.0, plan.speed * 0.95)]


def _blocked_lane(plan: _Plan) -> None:
    plan.lay_road(*_lane_beside(plan))
    plan.speed = plan.uniform(2.0, 8.5)
    cruise = plan.uniform(4.5, 7.0)
    start = plan.uniform(0.5, 2.0)
    length = max(16.0, 3.2 * (plan.speed + cruise) / 2)
    gap = max(11.0, start + 0.7 * length) + plan.uniform(0.0, 3.0)
    plan.add_vehicle(gap, plan.uniform(-0.3, 0.3), lights="hazard")
    plan.add("triangle", FRONT_M + gap - 2.5, plan.uniform(-0.3, 0.3))
    plan.shifts = [Shift(start, length, plan.sign * LANE_WIDTH_M)]
    plan.future = [(0.2, plan.speed), (3.0, cruise), (9.0, cruise)]


_EVENTS: dict[Event, Callable[[_Plan], None]] = {
    Event.LEAD_STEADY: _lead_steady,
    Event.LEAD_SLOWING: _lead_slowing,
    Event.LEAD_STOPPED: _lead_stopped,
    Event.RED_LIGHT: _red_light,
    Event.GREEN_LIGHT_START: _green_light_start,
    Event.GREEN_LIGHT_THROUGH: _green_light_through,
    Event.STOP_SIGN: _stop_sign,
    Event.CLEAR_ROAD: _clear_road,
    Event.PARKED_VEHICLE: _parked_vehicle,
    Event.CONES: _cones,
    Event.ROADSIDE_PERSON: _roadside_person,
    Event.CROSSING_PERSON: _crossing_person,
    Event.CURVE: _curve,
    Event.CUT_IN: _cut_in,
    Event.BLOCKED_LANE: _blocked_lane,
}


def _add_traffic(plan: _Plan) -> None:
    """Vehicles that change nothing: oncoming ones, others in the next lanes, some parked far off the road."""
    lanes, event = plan.road.lanes, plan.facts.event
    for lane in range(lanes.oncoming):
        if plan.rng.random() < 0.45:
            d = lanes.divider_d + (lane + 0.5) * LANE_WIDTH_M
            plan.add(_vehicle(plan), plan.uniform(10.0, 60.0), d, turn=np.pi, speed=-plan.uniform(4.0, 12.0))
    beside = {"left": lanes.left, "right": lanes.right}
    if event in (Event.CUT_IN, Event.BLOCKED_LANE):
        beside[plan.facts.side] = 0
    for side, count in beside.items():
        if count and plan.rng.random() < 0.3:
            d = LANE_WIDTH_M if side == "left" else -LANE_WIDTH_M
            plan.add(_vehicle(plan), plan.uniform(8.0, 40.0), d, speed=max(2.0, plan.speed))
    if plan.rng.random() < 0.35:
        # On the side where the event is not; signs and lights stand at the right.
        left = plan.facts.side == "right" or event not in SIDED
        kind = _vehicle(plan)
        clear = 2.2 + VEHICLE_SIZES[kind][1] / 2
        d = lanes.left_edge_d + clear if left else lanes.right_edge_d - clear
        if event is not Event.CURVE:
            plan.add(kind, plan.uniform(8.0, 45.0), d)


def _vehicle(plan: _Plan) -> str:
    return VEHICLES[plan.rng.choice(len(VEHICLES), p=_VEHICLE_SHARES)]


def _add_surroundings(plan: _Plan) -> None:
    """Trees, buildings and posts beside the road, none of them on it or before a sign."""
    lanes = plan.road.lanes
    width = max(lanes.left_edge_d, -lanes.right_edge_d)
    for _ in range(int(plan.rng.integers(5, 10))):
        kind = ("tree", "tree", "building", "post")[plan.rng.integers(4)]
        side = 1.0 if plan.rng.random() < 0.5 else -1.0
        edge = lanes.left_edge_d if side > 0 else lanes.right_edge_d
        away = {"tree": plan.uniform(6.0, 14.0), "building": plan.uniform(14.0, 24.0), "post": 5.5}[kind]
        size = plan.uniform(0.8, 1.4)
        shade = int(plan.rng.integers(-25, 26))
        base = {"tree": (60, 105, 50), "building": (165, 150, 135), "post": (120, 120, 125)}[kind]
        red, green, blue = (value + shade for value in base)
        s = plan.uniform(2.0, 80.0)
        x, y = plan.road.point(s, edge + side * away)
        if plan.road.distance_to(x, y) > width + away - 3.0 - (width - abs(edge)):
            plan.add(kind, s, edge + side * away, colour=(red, green, blue), size=size)
