"""The grammar that Chains of Causation are made of: each phrase and its wordings."""

from __future__ import annotations

from typing import NamedTuple

from alpamayo_dflash.world.facts import Event


class Wording(NamedTuple):
    """One way to put an event into words.

    Attributes:
        weight: how often, relative to the event's other wordings.
        period: share of its texts that end in a period.
        template: the text without its period; `<a:2|b>` stands for a choice of weights 2 and 1, and
            `{actor}`, `{side}` (the event's side) and `{other}` (the opposite one) for the facts.
    """

    weight: float
    period: float
    template: str


# fmt: off
GRAMMAR: dict[Event, tuple[Wording, ...]] = {
    Event.LEAD_STEADY: (
        Wording(27, 0.85, "Keep distance to the lead vehicle because it is directly ahead in the same lane"),
        Wording(25, 0.97, "Keep distance to the lead vehicle because it is ahead in the same lane"),
        Wording(13, 0.05, "Keep distance to the lead vehicle to maintain a safe following gap"),
        Wording(12, 0.95, "Keep distance to the lead vehicle because it is moving <steadily:5|at a steady "
                "pace:2|at our speed> ahead"),
        Wording(7, 0.95, "Keep distance to the lead {actor} <because it is:4|since it is> <directly "
                "ahead:2|driving ahead> in our lane"),
        Wording(6, 0.95, "Keep distance to the lead <vehicle:3|{actor}> since it <sets the pace:4|leads "
                "traffic> <ahead:3|in our lane>"),
        Wording(6, 0.10, "Adapt speed to maintain a safe <distance from:3|gap to> the lead "
                "<vehicle:3|{actor}> <ahead:3|in the same lane>"),
        Wording(5, 0.92, "Maintain a safe <distance from:3|headway to> the lead <vehicle:3|{actor}> "
                "<ahead:2|in our lane|since it is moving steadily ahead|since the gap is stable>"),
        Wording(3, 0.95, "Follow the lead <vehicle|{actor}> at a safe <distance:2|gap> <in the same "
                "lane|since it keeps a steady pace ahead|as it cruises ahead>"),
        Wording(2, 0.95, "Keep distance to the lead <vehicle|{actor}> because it is <driving|traveling> "
                "at a steady pace directly ahead, requiring a safe following <gap|distance> while we "
                "<match its speed|stay behind it> and remain ready to <slow|brake> if traffic ahead "
                "<slows|queues>"),
    ),
    Event.LEAD_SLOWING: (
        Wording(49, 0.97, "Slow down to keep distance to the lead vehicle"),
        Wording(14, 0.95, "Slow down due to the lead vehicle braking ahead"),
        Wording(15, 0.95, "Slow down due to the lead <vehicle:2|{actor}> ahead "
                "<braking:3|decelerating|slowing> and <the gap closing:3|reducing speed|approaching a "
                "stop>"),
        Wording(13, 0.97, "Slow down to maintain a safe following distance from the "
                "<decelerating|slowing:3|braking> lead <{actor}|vehicle:2> ahead"),
        Wording(9, 0.10, "Decelerate to maintain a safe distance <from:3|to> the lead <vehicle:3|{actor}> "
                "<since it is slowing ahead:3|since it brakes ahead|as its brake lights come on>"),
        Wording(5, 0.92, "Reduce speed because the gap to the <braking|slowing|leading> {actor} ahead is "
                "closing"),
        Wording(19, 0.97, "Slow down due to the lead <vehicle|{actor}> ahead <braking|decelerating> and "
                "<the gap closing|reducing speed|approaching a stop>, requiring a safe following "
                "<gap|distance> while we <match its speed|stay behind it> and remain ready to "
                "<stop|brake> if traffic ahead <queues|stops>"),
    ),
    Event.LEAD_STOPPED: (
        Wording(70, 0.95, "Stop to keep distance to the lead vehicle"),
        Wording(14, 0.10, "Stop to keep distance to the lead <vehicle:3|{actor}> since it is "
                "<stopped:4|stationary:2|standing still> <ahead:4|in our lane>"),
        Wording(14, 0.95, "Come to a stop due to the lead <vehicle|{actor}> ahead <being stopped:3|being "
                "stationary|remaining stopped|standing still> in <our:4|the> lane"),
        Wording(7, 0.92, "Stop behind the <stopped|stationary> lead <vehicle|{actor}> <ahead|in our lane>"),
        Wording(5, 0.92, "Slow to a stop because the lead <vehicle|{actor}> is <stopped:2|stationary> "
                "<ahead|in the same lane>"),
        Wording(5, 0.97, "Come to a stop due to the lead <vehicle|{actor}> ahead <being stopped|standing "
                "still> in our lane, requiring a safe following <gap|distance> while we <wait behind "
                "it|stay behind it> and remain ready to <proceed|move> when traffic ahead <clears|moves> "
                "again"),
    ),
    Event.RED_LIGHT: (
        Wording(46, 0.05, "Stop at the stop line since the straight traffic light is red"),
        Wording(26, 0.05, "Stop due to the red traffic light"),
        Wording(10, 0.95, "Stop for the red traffic light"),
        Wording(7, 0.10, "Stop at the stop line due to the red traffic light"),
        Wording(6, 0.95, "Slow down to stop <for:3|due to> the red <traffic light:2|straight traffic "
                "light> <ahead|at the intersection>"),
        Wording(5, 0.92, "Stop at the stop line <because:2|as> the <traffic light:2|signal> <ahead:2|at "
                "the intersection> is red"),
        Wording(4, 0.92, "Come to a stop <at the stop line|before the intersection|at the intersection> "
                "since the <straight traffic light|traffic light|signal ahead> is red"),
        Wording(3, 0.60, "Slow to a stop <due to|for> the red <traffic light:2|signal> <ahead:2|facing "
                "our approach>"),
        Wording(2, 0.97, "Come to a stop at the stop line because the straight traffic light ahead is "
                "red, requiring us to <wait|hold> before the intersection and remain ready to "
                "<proceed|accelerate> when the <light|signal> <clears|turns> for our lane"),
    ),
    Event.GREEN_LIGHT_START: (
        Wording(66, 0.97, "Accelerate to proceed through the intersection since the straight traffic "
                "light turns green"),
        Wording(18, 0.95, "Accelerate to proceed through the intersection since the straight traffic "
                "light is green"),
        Wording(10, 0.30, "Accelerate <through:4|gently through|smoothly across> the intersection "
                "<since:2|because> the <traffic light:2|signal ahead> <turns:2|is now> green"),
        Wording(8, 0.40, "Accelerate to proceed <through the intersection:2|straight> due to the <green "
                "traffic light|traffic light turning green|signal turning green>"),
        Wording(6, 0.70, "Accelerate <from the stop:2|from the stop line> <since|as> the <traffic "
                "light:2|signal> <has turned:2|turns> green"),
    ),
    Event.GREEN_LIGHT_THROUGH: (
        Wording(66, 0.97, "Keep speed through the intersection since the traffic light is green"),
        Wording(20, 0.85, "Keep speed through the intersection since the straight traffic light is green"),
        Wording(9, 0.40, "Keep speed to <proceed through:2|cross> the intersection <since:2|because> the "
                "<traffic light:2|signal> <ahead:2|for our lane> is green"),
        Wording(8, 0.50, "Maintain speed <through:2|across> the intersection <due to|since we have> the "
                "green <traffic light:2|signal>"),
    ),
    Event.STOP_SIGN: (
        Wording(46, 0.97, "Stop at the stop line for the stop sign"),
        Wording(18, 0.95, "Stop for the stop sign at the intersection"),
        Wording(14, 0.95, "Slow down to stop for the stop sign ahead"),
        Wording(9, 0.95, "Stop due to the stop sign <at:2|controlling> the <intersection:2|upcoming "
                "intersection>"),
        Wording(8, 0.92, "Stop at the stop sign <since the intersection is controlled|to yield to cross "
                "traffic|to check for cross traffic|before the intersection>"),
        Wording(6, 0.50, "Come to a stop <at the stop line:2|before the intersection> <due to|for> the "
                "stop sign <ahead:2|posted at the corner>"),
        Wording(2, 0.97, "Slow down to stop for the stop sign ahead, requiring us to <wait|hold> at the "
                "stop line before the intersection and remain ready to <proceed|accelerate> when the "
                "<cross traffic|way ahead> <clears|is clear> for our lane"),
    ),
    Event.CLEAR_ROAD: (
        Wording(48, 0.97, "Keep lane to continue driving since no critical agent needs attention"),
        Wording(32, 0.97, "Keep lane to continue driving since the lane ahead is clear"),
        Wording(10, 0.60, "Keep lane <since:2|because> the <road:2|lane|way> ahead is <clear:3|free|open>"),
        Wording(7, 0.50, "Keep lane to <continue driving|continue straight|follow the road> <since:2|as> "
                "<the road ahead is clear:2|no obstacle is in view|nothing needs attention>"),
        Wording(4, 0.40, "Continue straight in our lane <since|as> the <road|lane> ahead is <clear|open>"),
        Wording(2, 0.97, "Keep lane to continue driving since the <road|lane> ahead is clear and no "
                "critical agent needs attention, allowing us to <hold|maintain> a steady speed while we "
                "remain ready to <slow|brake> if traffic ahead <queues|slows>"),
    ),
    Event.PARKED_VEHICLE: (
        Wording(56, 0.05, "Nudge {other} to pass the parked vehicle on the {side}"),
        Wording(20, 0.05, "Nudge {other} to pass the parked {actor} on the {side}"),
        Wording(16, 0.97, "Nudge to the {other} to increase clearance from the parked <vehicle:2|{actor}> "
                "<on the {side}:3|encroaching into the lane|ahead>"),
        Wording(8, 0.10, "Nudge {other} to <overtake:3|avoid> the parked <vehicle:2|{actor}> <on the "
                "{side}:3|ahead|at the {side} curb>"),
        Wording(7, 0.95, "Nudge {other} to increase clearance from the parked <vehicle|{actor}> <on the "
                "{side} shoulder|at the {side} edge|reaching into our lane>"),
        Wording(5, 0.92, "Nudge to the {other} because a parked {actor} <encroaches into|reaches "
                "into|narrows> our lane <from the {side}|ahead>"),
        Wording(3, 0.97, "Nudge to the {other} to increase clearance from the parked {actor} encroaching "
                "into the lane from the {side} <edge|shoulder>, requiring a <small|slight> shift to the "
                "{other} while we <hold|maintain> a steady speed and then return to the lane center"),
    ),
    Event.CONES: (
        Wording(58, 0.05, "Nudge {other} to avoid the cones on the {side} side"),
        Wording(20, 0.97, "Nudge to the {other} to increase clearance from the construction cones on the "
                "{side}"),
        Wording(12, 0.60, "Nudge to the {other} to avoid the <construction:2|traffic|work zone> cones "
                "<encroaching into the lane:2|lining the {side} shoulder>"),
        Wording(8, 0.40, "Nudge {other} <since|because> the <cones|work zone cones> <narrow:2|close part "
                "of> our lane <ahead|from the {side}>"),
        Wording(4, 0.97, "Nudge to the {other} to increase clearance from the construction cones on the "
                "{side}, requiring a <small|slight> shift to the {other} while we <hold|maintain> a "
                "steady speed and then return to the lane center after the work zone"),
    ),
    Event.ROADSIDE_PERSON: (
        Wording(52, 0.97, "Nudge to the {other} to increase clearance from the {actor} on the {side}"),
        Wording(24, 0.05, "Nudge {other} to increase clearance from the {actor} ahead"),
        Wording(13, 0.10, "Nudge {other} to <pass:3|give space to|leave room for> the {actor} <on the "
                "{side}:2|on the {side} side|at the {side} edge>"),
        Wording(8, 0.95, "Nudge to the {other} <since|because> the {actor} is <close to|near|beside> our "
                "lane <ahead|on the {side}>"),
        Wording(4, 0.97, "Nudge to the {other} to increase clearance from the {actor} on the {side}, "
                "requiring a <small|slight> shift to the {other} while we <hold|maintain> a <steady|low> "
                "speed and then return to the lane center after passing"),
    ),
    Event.CROSSING_PERSON: (
        Wording(62, 0.05, "Yield to the {actor} since they are crossing our lane ahead"),
        Wording(22, 0.97, "Yield to the {actor} crossing the road ahead"),
        Wording(12, 0.10, "Yield due to a {actor} <crossing the road:2|crossing our lane|in the crosswalk>"),
        Wording(8, 0.95, "Yield to the {actor} <in the crosswalk|crossing from the side|crossing the "
                "street|entering our path> <ahead|in front of us>"),
        Wording(6, 0.95, "Slow down to yield to the {actor} <crossing:2|in> <the road|our lane> ahead"),
        Wording(6, 0.95, "Stop to yield to the {actor} <crossing ahead|in the crosswalk|crossing our lane>"),
        Wording(4, 0.97, "Yield to the {actor} crossing the road ahead, requiring us to <slow|brake> and "
                "<wait|hold> before the crossing and remain ready to <proceed|accelerate> when they have "
                "<left|cleared> our lane and the way ahead is clear"),
    ),
    Event.CURVE: (
        Wording(76, 0.97, "Adapt speed for the {side} curve ahead"),
        Wording(14, 0.92, "Adapt speed to slow for the {side} curve ahead"),
        Wording(10, 0.70, "Adapt speed for the <upcoming:2|sharp|winding> {side} curve <ahead|of the road>"),
        Wording(7, 0.60, "Adapt speed <because:2|since> the road <bends:2|curves> <{side} ahead:2|sharply "
                "to the {side}>"),
        Wording(6, 0.50, "Adjust speed <due to:2|for> the {side} <curve:2|bend> <ahead:2|in the road>"),
        Wording(4, 0.95, "Slow down to follow the {side} curve <of the road:2|ahead>"),
        Wording(3, 0.97, "Adapt speed for the {side} curve ahead, requiring us to slow before the road "
                "bends <{side}|sharply> and <hold|maintain> a <steady|controlled> speed through the curve "
                "while we stay in the lane center until it ends"),
    ),
    Event.CUT_IN: (
        Wording(56, 0.05, "Keep distance to the cut-in vehicle since it merges into our lane ahead"),
        Wording(20, 0.97, "Keep distance to the cut-in vehicle from the {side}"),
        Wording(12, 0.95, "Keep distance to the cut-in <vehicle|{actor}> <because:2|since> it is <merging "
                "into our lane|cutting in|moving into our lane> from the {side}"),
        Wording(10, 0.50, "Keep distance to the {actor} <cutting in|merging into our lane:2> <from the "
                "{side}:2|ahead>"),
        Wording(6, 0.60, "Maintain a safe distance from the cut-in <vehicle|{actor}> <ahead|from the "
                "{side}>"),
        Wording(12, 0.97, "Keep distance to the cut-in <vehicle|{actor}> because it is merging into our "
                "lane from the {side}, requiring a safe following <gap|distance> while we <let it in|stay "
                "behind it> and remain ready to <slow|brake> if the gap ahead closes"),
    ),
    Event.BLOCKED_LANE: (
        Wording(30, 0.05, "Change lane to the {side} to pass the stopped vehicle blocking our lane"),
        Wording(14, 0.92, "Change lanes to the {side} to pass the <stopped:2|stationary> "
                "<vehicle|{actor}> <in the same lane|blocking our lane:2>"),
        Wording(8, 0.92, "Lane change to the {side} to pass the stopped <vehicle:2|{actor}> <in the same "
                "lane:2|with hazard lights on>"),
        Wording(62, 0.95, "Change lanes to the {side} to pass the <stopped:2|stationary> "
                "<vehicle|{actor}> blocking our lane ahead, <using the clear gap in|moving into> the "
                "<open|free> {side} lane while we <hold|maintain> safe clearance and then "
                "<continue|proceed> past it at a steady speed"),
    ),
}
