"""What a Chain-of-Causation text says to do: the manoeuvre that it starts with."""

from __future__ import annotations

import re

# The manoeuvre stands at the start of a text; the first pattern that matches there names it.
_MANOEUVRES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), manoeuvre)
    for pattern, manoeuvre in (
        (r"(stop|slow|slow down|decelerate|brake|wait) (to|and) yield\b", "yield"),
        (r"yield\b", "yield"),
        (r"(come|slow|slow down|brake) to (a )?(stop|halt)\b", "stop"),
        (r"slow down and (come to a )?stop\b", "stop"),
        (r"(stop|halt|stay stopped|remain stopped)\b", "stop"),
        (r"slow down to (follow|take) the (left|right)\b", "adapt speed"),
        (r"(slow|decelerate|brake|reduce speed)\b", "slow down"),
        (r"(adapt|adjust) speed\b.{0,30}\b(distance|gap|headway)\b", "keep distance"),
        (r"(adapt|adjust) speed\b", "adapt speed"),
        (r"(keep|maintain|hold) (a )?(safe )?(following )?(distance|gap|headway)\b", "keep distance"),
        (r"follow the\b", "keep distance"),
        (r"(keep|maintain|hold) speed\b", "keep speed"),
        (r"(keep|maintain|hold) (our |the )?lane\b", "keep lane"),
        (r"continue (straight|driving)\b", "keep lane"),
        (r"(accelerate|speed up)\b", "accelerate"),
    )
)
_SIDED_MANOEUVRES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"nudge (?:to the )?(left|right)\b"), "nudge"),
    (re.compile(r"(?:change lanes?|lane change|move) (?:to the )?(left|right)\b"), "change lane"),
)


def manoeuvre_of(text: str) -> str:
    """The manoeuvre that a text starts with, in one phrase; "" where none is recognised."""
    lowered = " ".join(text.lower().split())
    for pattern, name in _SIDED_MANOEUVRES:
        match = pattern.match(lowered)
        if match:
            return f"{name} {match[1]}"
    return next((name for pattern, name in _MANOEUVRES if pattern.match(lowered)), "")
