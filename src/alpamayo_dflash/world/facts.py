"""What a scene is about: the one event that decides the manoeuvre, and the words for both.

The renderer draws a scene's facts, the language module speaks of them, and scoring reads them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Side = Literal["left", "right", ""]

VEHICLES = ("car", "truck", "van", "bus")
PERSONS = ("pedestrian", "cyclist")


class Event(StrEnum):
    """The event of a scene, one of fifteen."""

    LEAD_STEADY = "lead_steady"  # a lead vehicle drives ahead at about the ego's speed
    LEAD_SLOWING = "lead_slowing"  # the lead vehicle brakes: brake lights, closing gap
    LEAD_STOPPED = "lead_stopped"  # the lead vehicle stands ahead: the ego stops behind it
    RED_LIGHT = "red_light"  # a red light ahead, no lead vehicle
    GREEN_LIGHT_START = "green_light_start"  # the ego stands, the light has turned green
    GREEN_LIGHT_THROUGH = "green_light_through"  # the ego drives through a green light
    STOP_SIGN = "stop_sign"
    CLEAR_ROAD = "clear_road"  # nothing ahead asks for anything
    PARKED_VEHICLE = "parked_vehicle"  # parked at the road's `side`, reaching into the lane
    CONES = "cones"  # cones along `side`
    ROADSIDE_PERSON = "roadside_person"  # a pedestrian or cyclist along `side`
    CROSSING_PERSON = "crossing_person"  # a pedestrian or cyclist crosses the ego's lane
    CURVE = "curve"  # the road bends to `side`, sharply
    CUT_IN = "cut_in"  # a vehicle moves into the ego's lane from `side`
    BLOCKED_LANE = "blocked_lane"  # a stopped vehicle blocks the lane; the lane at `side` is free


# How often each event is drawn.
EVENT_SHARES: dict[Event, float] = {
    Event.LEAD_STEADY: 0.24,
    Event.LEAD_SLOWING: 0.09,
    Event.LEAD_STOPPED: 0.07,
    Event.RED_LIGHT: 0.11,
    Event.GREEN_LIGHT_START: 0.05,
    Event.GREEN_LIGHT_THROUGH: 0.03,
    Event.STOP_SIGN: 0.06,
    Event.CLEAR_ROAD: 0.08,
    Event.PARKED_VEHICLE: 0.07,
    Event.CONES: 0.03,
    Event.ROADSIDE_PERSON: 0.03,
    Event.CROSSING_PERSON: 0.04,
    Event.CURVE: 0.05,
    Event.CUT_IN: 0.03,
    Event.BLOCKED_LANE: 0.02,
}

SIDED = frozenset(
    {Event.PARKED_VEHICLE, Event.CONES, Event.ROADSIDE_PERSON, Event.CURVE, Event.CUT_IN, Event.BLOCKED_LANE}
)
WITH_VEHICLE = frozenset(
    {
        Event.LEAD_STEADY,
        Event.LEAD_SLOWING,
        Event.LEAD_STOPPED,
        Event.PARKED_VEHICLE,
        Event.CUT_IN,
        Event.BLOCKED_LANE,
    }
)
WITH_PERSON = frozenset({Event.ROADSIDE_PERSON, Event.CROSSING_PERSON})

OTHER_SIDE: dict[Side, Side] = {"left": "right", "right": "left", "": ""}


@dataclass(frozen=True)
class Facts:
    """The facts of one scene.

    Attributes:
        event: what happens.
        side: where, for events in `SIDED`; "" for the others.
        actor: a vehicle of `VEHICLES` for events in `WITH_VEHICLE`, a person of `PERSONS` for events in
            `WITH_PERSON`; "" for the others.

    Raises:
        ValueError: side or actor do not fit the event.
    """

    event: Event
    side: Side = ""
    actor: str = ""

    def __post_init__(self) -> None:
        """Check that side and actor fit the event."""
        if (self.event in SIDED) != (self.side in ("left", "right")):
            raise ValueError(f"side {self.side!r} does not fit event {self.event}")
        allowed = VEHICLES if self.event in WITH_VEHICLE else PERSONS if self.event in WITH_PERSON else ("",)
        if self.actor not in allowed:
            raise ValueError(f"actor {self.actor!r} does not fit event {self.event}; it takes {allowed}")

    @property
    def manoeuvre(self) -> str:
        """What the ego does, in one of a dozen canonical phrases."""
        match self.event:
            case Event.LEAD_STEADY | Event.CUT_IN:
                return "keep distance"
            case Event.LEAD_SLOWING:
                return "slow down"
            case Event.LEAD_STOPPED | Event.RED_LIGHT | Event.STOP_SIGN:
                return "stop"
            case Event.GREEN_LIGHT_START:
                return "accelerate"
            case Event.GREEN_LIGHT_THROUGH:
                return "keep speed"
            case Event.CLEAR_ROAD:
                return "keep lane"
            case Event.PARKED_VEHICLE | Event.CONES | Event.ROADSIDE_PERSON:
                return f"nudge {OTHER_SIDE[self.side]}"
            case Event.CROSSING_PERSON:
                return "yield"
            case Event.CURVE:
                return "adapt speed"
            case Event.BLOCKED_LANE:
                return f"change lane {self.side}"

    @property
    def cause(self) -> str:
        """Why the ego does it, in one canonical phrase (the vehicle's kind is left out)."""
        match self.event:
            case Event.LEAD_STEADY | Event.LEAD_SLOWING | Event.LEAD_STOPPED:
                return "lead vehicle"
            case Event.RED_LIGHT:
                return "red light"
            case Event.GREEN_LIGHT_START | Event.GREEN_LIGHT_THROUGH:
                return "green light"
            case Event.STOP_SIGN:
                return "stop sign"
            case Event.CLEAR_ROAD:
                return "clear road"
            case Event.PARKED_VEHICLE:
                return "parked vehicle"
            case Event.CONES:
                return "cones"
            case Event.ROADSIDE_PERSON | Event.CROSSING_PERSON:
                return self.actor
            case Event.CURVE:
                return f"{self.side} curve"
            case Event.CUT_IN:
                return "cut-in vehicle"
            case Event.BLOCKED_LANE:
                return "stopped vehicle"
