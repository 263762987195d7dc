"""The graphics of a clip: specifications by Vega-Altair whose data the browser puts in.

Named data and parameters are what the browser sets. A colour is a value of the data, so that it follows the
page's theme; what it says is said by a shape, a dash or a letter too.
"""

from __future__ import annotations

from typing import Any

from alpamayo_dflash.common.extras import needs

with needs("report"):
    import altair as alt

LANE_PX = 78
"""Height of a lane of a round's tree."""
STEP_PX = (68, 104)
"""How wide a step from token to token is, at least and at most; the room decides."""
PART_ORDER = ("prefill", "decode", "round", "draft", "verify", "sampling", "cache", "action")
_STATES = {"anchor": "square", "accepted": "circle", "rejected": "cross", "own": "diamond"}
_KINDS = {"history": [2, 3], "what the vehicle did": [8, 4], "sample": [1, 0]}
_VALUE_COLOUR = alt.Color("colour:N", scale=None, legend=None)


def clip_specs() -> dict[str, Any]:
    """The specifications by name: `tree`, `paths`, `timing`; and the sizes that the browser multiplies."""
    sizes = {"lane": LANE_PX, "step": STEP_PX}
    return {"sizes": sizes, "tree": _tree(), "paths": _paths(), "timing": _timing()}


def _tree() -> dict[str, Any]:
    """Data `edges` (x, y, x2, y2, colour, taken) and `nodes` (x, y, piece, p, rank, state, ink, colour)."""
    sizes = [
        alt.param(name, value=value) for name, value in (("depth", 1), ("lane", 0), ("step", STEP_PX[1]))
    ]
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[-0.5, alt.expr("depth + 0.5")], nice=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[alt.expr("lane + 0.5"), -0.5], nice=False))
    edges = (
        alt.Chart(alt.NamedData(name="edges"))
        .mark_rule(strokeWidth=2)
        .encode(
            x=x,
            y=y,
            x2="x2:Q",
            y2="y2:Q",
            color=_VALUE_COLOUR,
            strokeDash=alt.StrokeDash(
                "taken:N", scale=alt.Scale(domain=[True, False], range=[[1, 0], [4, 4]]), legend=None
            ),
        )
    )
    nodes = alt.Chart(alt.NamedData(name="nodes"))
    shape = alt.Shape(
        "state:N", scale=alt.Scale(domain=list(_STATES), range=list(_STATES.values())), legend=None
    )
    marks = nodes.mark_point(size=170, filled=True, opacity=1)
    marks = marks.encode(x=x, y=y, shape=shape, color=_VALUE_COLOUR)
    ink = alt.Color("ink:N", scale=None, legend=None)
    places = {"piece": (-16, 12), "p": (18, 11), "rank": (30, 10)}
    texts = [
        nodes.mark_text(dy=dy, fontSize=size, limit=alt.expr("step - 4")).encode(
            x=x, y=y, text=f"{name}:N", color=ink
        )
        for name, (dy, size) in places.items()
    ]
    tree = alt.layer(edges, marks, *texts, description="The tree of the round")
    return tree.add_params(*sizes).to_dict()


def _paths() -> dict[str, Any]:
    """Data `paths` (path, kind, t, x, y, colour, width), forward to the right and left upwards."""
    ends = [alt.param(name, value=value) for name, value in _ENDS.items()]
    paths = alt.Chart(alt.NamedData(name="paths"))
    x = alt.X(
        "x:Q",
        title="forward, m",
        scale=alt.Scale(domain=[alt.expr("x_from"), alt.expr("x_to")], nice=False, zero=False),
    )
    y = alt.Y(
        "y:Q",
        title="left, m",
        scale=alt.Scale(domain=[alt.expr("y_from"), alt.expr("y_to")], nice=False, zero=False),
        axis=alt.Axis(tickCount=5),
    )
    dash = alt.StrokeDash(
        "kind:N", scale=alt.Scale(domain=list(_KINDS), range=list(_KINDS.values())), legend=None
    )
    lines = paths.mark_line(clip=True).encode(
        x=x,
        y=y,
        order="t:Q",
        detail="path:N",
        color=_VALUE_COLOUR,
        strokeDash=dash,
        strokeWidth=alt.StrokeWidth("width:Q", scale=None, legend=None),
    )
    here = (
        paths.transform_filter("datum.t == 0")
        .mark_point(shape="triangle-right", size=130, filled=True, opacity=1, clip=True)
        .encode(x=x, y=y, color=_VALUE_COLOUR)
    )
    return alt.layer(lines, here, description="The paths from above").add_params(*ends).to_dict()


_ENDS = {"x_from": -10, "x_to": 10, "y_from": -10, "y_to": 10}


def _timing() -> dict[str, Any]:
    """Data `bars` (name, start_ms, end_ms, colour)."""
    chart = (
        alt.Chart(alt.NamedData(name="bars"), description="The clip's time by part")
        .mark_bar(strokeWidth=1)
        .encode(
            x=alt.X("start_ms:Q", title="ms from the prompt's reading on"),
            x2="end_ms:Q",
            y=alt.Y("name:N", title=None, sort=list(PART_ORDER)),
            color=_VALUE_COLOUR,
            stroke=alt.Stroke("colour:N", scale=None, legend=None),
        )
        .properties(height=alt.Step(22))
    )
    found: dict[str, Any] = chart.to_dict()
    return found
