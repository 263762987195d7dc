"""The page's charts: Vega-Lite specifications by Altair, each over the rows of one table.

A specification names its data "rows" and no colour: the colours of light and dark come from `theme`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.report.page import measures
from alpamayo_dflash.report.page.data import DataTable, Figure
from alpamayo_dflash.report.page.palette import OTHER_LOOK, SOURCE_LOOKS
from alpamayo_dflash.report.page.runs import Run, Series
from alpamayo_dflash.report.tables import ARM_NAMES

with needs("report"):
    import altair

Ground = Literal["light", "dark", "both"]
_ROW = 22  # pixels of a bar
_HEIGHT = 260
_FEW = 5  # tokens at a place, of which a share says little
# The colours' order: blue, vermilion, green, orange, purple, grey.
_SOURCES = ("draft", "target", "end rule", "last window", "phrase tree")
_ARMS = (ARM_NAMES["dflash"], ARM_NAMES["autoregressive"], ARM_NAMES["transformers"])
_WINDOW_ARMS = (
    *(name for arm, name in measures.WINDOW_ARMS.items() if arm != "floor"),
    "",
    "floor",
)  # the last is grey
_PARTS = ("prefill", "decode", "action", "preprocess", "vision", "prompt")
# Ink, muted ink, lines and paper, as in page.css.
_INK: Mapping[Ground, tuple[str, str, str, str]] = {
    "light": ("#1a1d21", "#555c66", "#c9ced6", "#ffffff"),
    "dark": ("#e9ecef", "#a9b2bd", "#3d454f", "#14171b"),
    "both": ("#767676", "#767676", "#9a9a9a", "#ffffff"),
}


def theme(ground: Ground) -> dict[str, Any]:
    """Vega's config: ink and the colours that the colour-blind can tell apart, on a transparent ground.

    Args:
        ground: of what the chart will stand on; "both" is grey ink that can be read on either.
    """
    (ink, muted, line, paper), dark = _INK[ground], ground == "dark"
    looks = [*(SOURCE_LOOKS[name] for name in _SOURCES), OTHER_LOOK]
    colours = [look.dark if dark else look.light for look in looks]
    font = "system-ui, 'DejaVu Sans', sans-serif"
    axis = {"labelColor": ink, "titleColor": ink, "gridColor": line, "domainColor": muted, "tickColor": muted}
    return {
        "background": "transparent",
        "font": font,
        "axis": {
            **axis,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "labelLimit": 170,
        },
        "legend": {
            **{"labelColor": ink, "titleColor": ink, "orient": "top", "title": None, "labelFontSize": 12},
            **{
                "columns": 2,
                "labelLimit": 140,
                "symbolStrokeWidth": 2,
                "symbolOpacity": 1,
                "symbolBaseFillColor": ink,
                "symbolBaseStrokeColor": ink,
            },
        },
        "title": {"color": ink},
        "view": {"stroke": None},
        "range": {"category": colours},
        "mark": {"color": colours[0]},
        "style": {"strong": {"color": ink, "stroke": paper, "strokeWidth": 1}},
        "rule": {"color": ink},
        "text": {"color": ink},
        "line": {"strokeWidth": 2},
        "bar": {"cornerRadius": 1},
    }


def time_figures(runs: Sequence[Run]) -> list[Figure]:
    """Times by part, tokens against time, speed-ups, and those of benchmarks beside their floors."""
    series = _series(runs)
    several = len(series) > 1
    found = [
        _figure(
            "time-parts",
            measures.times(series),
            _time_parts(several),
            "Stacked bars: ms of each part by arm.",
        ),
        _figure(
            "decode-parts", measures.decode_parts(series), _decode_parts, "Bars: ms of each part of decode."
        ),
        _figure(
            "decode-by-tokens",
            measures.decode_by_tokens(runs),
            _decode_by_tokens(len(runs) > 1),
            "Points: decode time of each clip over its tokens, by arm.",
        ),
        _figure("speedup", measures.speedups(runs), _speedups(len(runs) > 1), "Ticks: each clip's speed-up."),
    ]
    for number, run in enumerate(runs):
        if run.bench is not None:
            found += _bench_figures(run, number)
    return [figure for figure in found if figure.table.rows]


def _bench_figures(run: Run, number: int) -> list[Figure]:
    assert run.bench is not None
    found = [
        _figure(
            f"window-{number}",
            measures.window_parts(run.name, run.bench),
            _window,
            "Bars: ms of each part of a window by arm, beside the floor.",
        )
    ]
    floors = measures.over_floors(run.name, run.bench)
    if floors is not None:
        found.append(
            _figure(f"floors-{number}", floors, _floors, "Bars: how many times its floor each time is.")
        )
    return found


def acceptance_figures(runs: Sequence[Run]) -> list[Figure]:
    """Acceptance: its distribution, by place in block and sentence, by manoeuvre."""
    series = _series(runs)
    found = [
        _figure(
            "round-lengths",
            measures.round_lengths(series),
            _round_lengths,
            "Bars: share of rounds by tokens.",
        ),
        _figure(
            "clip-lengths", measures.clip_lengths(runs), _clip_lengths, "Histogram of clips' tokens a pass."
        ),
        _figure(
            "block-places",
            measures.by_block_place(series),
            _block_places,
            "Lines: share accepted at each place of the block.",
        ),
        _figure(
            "sentence-places",
            measures.by_sentence_place(series),
            _sentence_places,
            "Lines: share accepted at each place of the sentence.",
        ),
        _figure(
            "manoeuvres", measures.by_manoeuvre(series), _manoeuvres, "Bars: tokens a pass by manoeuvre."
        ),
    ]
    return [figure for figure in found if figure.table.rows]


def source_figures(runs: Sequence[Run]) -> list[Figure]:
    """Who gave the tokens, in all and by place in the sentence."""
    found = [
        _figure(
            "sources", measures.by_source(_series(runs)), _by_source, "Stacked bars: share of each source."
        )
    ]
    for number, run in enumerate(runs):
        for each in run.series[:1]:
            table = measures.source_by_place(each)
            description = "Stacked bars: share of each source by place in the sentence."
            found.append(_figure(f"source-places-{number}", table, _source_places, description))
    return [figure for figure in found if figure.table.rows]


def error_figures(runs: Sequence[Run]) -> list[Figure]:
    """The trajectories' errors."""
    table = measures.errors(runs)
    description = "Points: each clip's minADE over the constant velocity's."
    return [_figure("errors", table, _errors, description)] if table.rows else []


def training_figures(runs: Sequence[Run]) -> list[Figure]:
    """Losses and acceptance over training."""
    several = sum(run.training is not None for run in runs) > 1
    found = [
        _figure("losses", measures.losses(runs), _losses(several), "Lines: losses over steps."),
        _figure(
            "training-acceptance",
            measures.training_acceptance(runs),
            _training_acceptance(several),
            "Lines: simulated, expected and real acceptance length over steps.",
        ),
    ]
    return [figure for figure in found if figure.table.rows]


def layer_figures(runs: Sequence[Run]) -> list[Figure]:
    """The scores of both steps that chose the taps."""
    found = [
        _figure("layers-cosine", measures.layer_cosines(runs), _layers("cosine"), "Line: cosine by layer."),
        _figure(
            "layers-early-exit",
            measures.layer_losses(runs),
            _layers("cross-entropy, nats"),
            "Line: early-exit cross-entropy by layer.",
        ),
    ]
    return [figure for figure in found if figure.table.rows]


def difference_figures(table: DataTable) -> list[Figure]:
    """The differences of runs from the first, in percent of its values."""
    description = "Points with intervals: each measure's difference from the first run."
    return [_figure("differences", table, _differences, description)] if table.rows else []


def _series(runs: Sequence[Run]) -> list[Series]:
    return [each for run in runs for each in run.series]


def _figure(name: str, table: DataTable, chart: Callable[[DataTable], Any], description: str) -> Figure:
    """A figure over its table's rows; nothing is drawn of an empty table."""
    spec: dict[str, Any] = {}
    if table.rows:
        spec = chart(table).properties(width="container", data=altair.NamedData("rows")).to_dict()
        spec.pop("config", None)  # the theme is the page's
    return Figure(name, spec, table, description)


def _base() -> Any:
    return altair.Chart(altair.NamedData("rows"))


def _colour(
    field: str, *, known: Sequence[str] = (), table: DataTable | None = None, labels: str | None = None
) -> Any:
    """Colour by a field.

    Args:
        field: what is told apart.
        known: values that keep their colours, in order, whichever of them are there.
        table: the rows; needed with `known`.
        labels: an expression of the legend's labels.
    """
    if table is None:
        return altair.Color(f"{field}:N", sort=None, title=None)
    there = list(dict.fromkeys(str(each[field]) for each in table.objects()))
    domain = [*known, *(name for name in there if name not in known)]
    legend: dict[str, Any] = {"values": [name for name in domain if name in there]}
    if labels is not None:
        legend |= {"labelExpr": labels, "labelLimit": 320, "columns": 1}  # long ones
    return altair.Color(f"{field}:N", scale=altair.Scale(domain=domain), title=None).legend(**legend)


def _series_colour(table: DataTable) -> Any:
    """Colour by run; of a single one the first colour, without a legend."""
    names = list(dict.fromkeys(str(each["series"]) for each in table.objects()))
    return _colour("series", table=table) if len(names) > 1 else altair.Undefined


def _time_parts(several: bool) -> Callable[[DataTable], Any]:
    def chart(table: DataTable) -> Any:
        base = _base().transform_calculate(label=_label("arm", several))
        return (
            base.mark_bar(height={"band": 0.7})
            .encode(
                x=altair.X("sum(ms):Q", title="ms, medians"),
                y=altair.Y("label:N", sort=None, title=None),
                color=_colour("part", known=_PARTS, table=table),
                order=altair.Order("index:Q"),
                tooltip=["series:N", "arm:N", "part:N", _ms("ms"), _ms("low"), _ms("high")],
            )
            .transform_calculate(
                index=_index("part", ("preprocess", "vision", "prompt", "prefill", "decode", "action"))
            )
            .properties(height=_bars(table, "arm", "series", 30))
        )

    return chart


def _label(field: str, several: bool) -> str:
    """What a bar is called: with the run's name where there are several."""
    return f"datum.series + ' · ' + datum.{field}" if several else f"datum.{field}"


def _index(field: str, order: Sequence[str]) -> str:
    return "indexof([" + ",".join(f"'{name}'" for name in order) + f"], datum.{field})"


def _ms(field: str) -> Any:
    return altair.Tooltip(f"{field}:Q", format=",.2f")


def _decode_parts(table: DataTable) -> Any:
    base = _base().encode(
        y=altair.Y("part:N", sort=None, title=None), yOffset=altair.YOffset("series:N", sort=None)
    )
    bars = base.mark_bar().encode(
        x=altair.X("ms:Q", title="ms a clip, means"),
        color=_series_colour(table),
        tooltip=[
            "series:N",
            "part:N",
            _ms("ms"),
            altair.Tooltip("share:Q", format=".1%"),
            _ms("low"),
            _ms("high"),
        ],
    )
    return (bars + _interval_x(base)).properties(height=_bars(table, "part", "series"))


def _bars(table: DataTable, rows: str, beside: str | None = None, row: int = _ROW) -> int:
    """The height of bars: of the rows, times those that stand beside each other in one."""
    objects = table.objects()
    count = len({each[rows] for each in objects})
    return max(60, row * count * (len({each[beside] for each in objects}) if beside else 1))


def _interval_x(base: Any) -> Any:
    return base.mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q")


def _decode_by_tokens(several: bool) -> Callable[[DataTable], Any]:
    def chart(table: DataTable) -> Any:
        encoding: dict[str, Any] = (
            {"shape": altair.Shape("series:N", sort=None, title=None)} if several else {}
        )
        return (
            _base()
            .mark_point(filled=True, opacity=0.7, size=45, cursor="pointer")
            .encode(
                x=altair.X("tokens:Q", title="tokens"),
                y=altair.Y("ms:Q", title="decode, ms"),
                color=_colour("arm", known=_ARMS, table=table),
                tooltip=["clip:N", "series:N", "arm:N", "tokens:Q", _ms("ms")],
                **encoding,
            )
            .properties(height=_HEIGHT)
        )

    return chart


def _speedups(several: bool) -> Callable[[DataTable], Any]:
    def chart(table: DataTable) -> Any:
        base = _base().transform_calculate(label=_label("against", several))
        y = altair.Y("label:N", sort=None, title=None)
        ticks = base.mark_tick(thickness=2, opacity=0.6, cursor="pointer").encode(
            x=altair.X("times:Q", title="times faster", scale=altair.Scale(zero=True)),
            y=y,
            color=_series_colour(table),
            tooltip=["clip:N", "series:N", "against:N", _ms("times")],
        )
        median = base.mark_point(filled=True, size=110, shape="diamond", opacity=1, style="strong").encode(
            x="median(times):Q",
            y=y,
            tooltip=[altair.Tooltip("median(times):Q", format=".2f")],
        )
        even = base.mark_rule(strokeDash=[4, 4], aria=False).encode(x=altair.datum(1))
        return altair.layer(even, ticks, median).properties(height=_bars(table, "against", "series", 46))

    return chart


def _window(table: DataTable) -> Any:
    wholes = {row["arm"]: row["ms"] for row in table.objects() if row["part"] == "whole"}
    known = ",".join(f"'{arm}':'{arm}: {ms:.0f} ms in all'" for arm, ms in wholes.items())
    labels = f"{{{known}}}[datum.label] || datum.label"
    return (
        _base()
        .transform_filter("datum.part !== 'whole'")
        .mark_bar()
        .encode(
            x=altair.X("ms:Q", title="ms"),
            y=altair.Y("part:N", sort=None, title=None),
            yOffset=altair.YOffset("arm:N", sort=None),
            color=_colour("arm", known=_WINDOW_ARMS, table=table, labels=labels),
            tooltip=["arm:N", "part:N", _ms("ms"), _ms("floor"), _ms("over")],
        )
        .properties(height=_bars(table, "part", "arm", 12))
    )


def _floors(table: DataTable) -> Any:
    base = _base().transform_calculate(label="datum.what + ', ' + datum.arm")
    y = altair.Y("label:N", sort=None, title=None, axis=altair.Axis(labelLimit=260))
    bars = base.mark_bar().encode(
        x=altair.X("measured_ms:Q", title="ms; the line is the floor"),
        y=y,
        tooltip=["what:N", "arm:N", _ms("measured_ms"), _ms("floor_ms"), "bound:N", _ms("over_floor")],
    )
    floor = base.mark_tick(thickness=3, size=18, style="strong").encode(x="floor_ms:Q", y=y)
    return (bars + floor).properties(height=_ROW * len(table.rows))


def _round_lengths(table: DataTable) -> Any:
    return (
        _base()
        .mark_bar()
        .encode(
            x=altair.X("tokens:O", title="tokens of a round", axis=altair.Axis(labelAngle=0)),
            xOffset=altair.XOffset("series:N", sort=None),
            y=altair.Y("share:Q", title="share of rounds", axis=altair.Axis(format="%")),
            color=_series_colour(table),
            tooltip=["series:N", "tokens:Q", "rounds:Q", altair.Tooltip("share:Q", format=".1%")],
        )
        .properties(height=_HEIGHT)
    )


def _clip_lengths(table: DataTable) -> Any:
    return (
        _base()
        .mark_bar(opacity=0.75)
        .encode(
            x=altair.X("length:Q", bin=altair.Bin(step=0.5), title="tokens a pass"),
            y=altair.Y("count():Q", title="clips", stack=None),
            color=_series_colour(table),
            tooltip=["series:N", altair.Tooltip("count():Q", title="clips")],
        )
        .properties(height=_HEIGHT)
    )


def _block_places(table: DataTable) -> Any:
    base = _base()
    x = altair.X(
        "place:Q", title="place in the block", axis=altair.Axis(tickMinStep=1), scale=altair.Scale(nice=False)
    )
    share = altair.Y(
        "share:Q", title="accepted", axis=altair.Axis(format="%"), scale=altair.Scale(domain=[0, 1])
    )
    band = base.mark_area(opacity=0.2).encode(x=x, y="low:Q", y2="high:Q", color=_series_colour(table))
    line = base.mark_line(point=True).encode(
        x=x,
        y=share,
        color=_series_colour(table),
        tooltip=[
            *("series:N", "place:Q", "proposed:Q", "taken:Q"),
            *(altair.Tooltip(f"{name}:Q", format=".1%") for name in ("share", "low", "high", "of_reached")),
        ],
    )
    dashed = base.mark_line(strokeDash=[5, 4]).encode(x=x, y="of_reached:Q", color=_series_colour(table))
    return altair.layer(band, dashed, line).properties(height=_HEIGHT)


def _sentence_places(table: DataTable) -> Any:
    base = _base()
    axis = altair.Axis(format="%")
    x = altair.X("place:Q", title="place in the sentence", scale=altair.Scale(nice=False))
    share = altair.Y("share:Q", title="accepted proposals", axis=axis, scale=altair.Scale(domain=[0, 1]))
    colour = _series_colour(table)
    many = base.transform_filter(f"datum.tokens >= {_FEW}")
    band = many.mark_area(opacity=0.2).encode(x=x, y="low:Q", y2="high:Q", color=colour)
    line = many.mark_line().encode(x=x, y=share, color=colour)
    points = base.mark_point(filled=True, opacity=0.8).encode(
        x=x,
        y=share,
        color=colour,
        size=altair.Size("tokens:Q", legend=None, scale=altair.Scale(range=[8, 90])),
        tooltip=[
            *("series:N", "place:Q", "tokens:Q", "given:Q"),
            *(altair.Tooltip(f"{name}:Q", format=".1%") for name in ("share", "low", "high")),
        ],
    )
    return altair.layer(band, line, points).properties(height=_HEIGHT)


def _manoeuvres(table: DataTable) -> Any:
    base = _base().encode(
        y=altair.Y(
            "manoeuvre:N", title=None, sort=altair.EncodingSortField("length", op="max", order="descending")
        ),
        yOffset=altair.YOffset("series:N", sort=None),
    )
    bars = base.mark_bar().encode(
        x=altair.X("length:Q", title="tokens a pass, pooled"),
        color=_series_colour(table),
        tooltip=["series:N", "manoeuvre:N", "clips:Q", "passes:Q", _ms("length"), _ms("low"), _ms("high")],
    )
    return (bars + _interval_x(base)).properties(height=_bars(table, "manoeuvre", "series", 16))


def _by_source(table: DataTable) -> Any:
    return (
        _base()
        .mark_bar(height={"band": 0.7})
        .encode(
            x=altair.X("tokens:Q", stack="normalize", title="share of tokens", axis=altair.Axis(format="%")),
            y=altair.Y("series:N", sort=None, title=None),
            color=_colour("source", known=_SOURCES, table=table),
            tooltip=["series:N", "source:N", "tokens:Q", altair.Tooltip("share:Q", format=".1%")],
        )
        .properties(height=_bars(table, "series", row=40))
    )


def _source_places(table: DataTable) -> Any:
    return (
        _base()
        .mark_bar()
        .encode(
            x=altair.X(
                "place:O", title="place in the sentence", axis=altair.Axis(labelOverlap=True, labelAngle=0)
            ),
            y=altair.Y("tokens:Q", stack="normalize", title="share of tokens", axis=altair.Axis(format="%")),
            color=_colour("source", known=_SOURCES, table=table),
            tooltip=["place:Q", "source:N", "tokens:Q"],
        )
        .properties(height=_HEIGHT)
    )


def _errors(table: DataTable) -> Any:
    points = (
        _base()
        .mark_point(filled=True, size=55, opacity=0.75, cursor="pointer")
        .encode(
            x=altair.X("constant:Q", title="constant velocity's ADE, m"),
            y=altair.Y("error:Q", title="minADE, m"),
            color=_series_colour(table),
            shape=altair.Shape("series:N", sort=None, title=None, legend=None),
            tooltip=["clip:N", "series:N", _ms("error"), _ms("constant")],
        )
    )
    even = (
        _base()
        .transform_aggregate(most="max(error)")
        .transform_calculate(zero="0")
        .mark_rule(strokeDash=[4, 4], aria=False)
        .encode(x="zero:Q", y="zero:Q", x2="most:Q", y2="most:Q")
    )
    return altair.layer(even, points).properties(height=_HEIGHT)


def _dash(several: bool) -> dict[str, Any]:
    return {"strokeDash": altair.StrokeDash("series:N", sort=None, title=None)} if several else {}


def _losses(several: bool) -> Callable[[DataTable], Any]:
    def chart(table: DataTable) -> Any:
        return (
            _base()
            .mark_line()
            .encode(
                x=altair.X("step:Q", title="step"),
                y=altair.Y("value:Q", title="nats"),
                color=_colour("loss"),
                tooltip=["series:N", "step:Q", "loss:N", altair.Tooltip("value:Q", format=".4f")],
                **_dash(several),
            )
            .properties(height=_HEIGHT)
        )

    return chart


def _training_acceptance(several: bool) -> Callable[[DataTable], Any]:
    def chart(table: DataTable) -> Any:
        base = _base().encode(
            x=altair.X("step:Q", title="step"),
            y=altair.Y("length:Q", title="tokens a pass", scale=altair.Scale(zero=True)),
            color=_colour("kind"),
        )
        tooltip = ["series:N", "step:Q", "kind:N", _ms("length"), "best:N"]
        line = base.mark_line().encode(**_dash(several))
        points = base.mark_point(size=40).encode(tooltip=tooltip)
        best = (
            base.transform_filter("datum.best")
            .mark_point(filled=True, size=120, opacity=1)
            .encode(tooltip=tooltip)
        )
        return altair.layer(line, points, best).properties(height=_HEIGHT)

    return chart


def _layers(title: str) -> Callable[[DataTable], Any]:
    def chart(table: DataTable) -> Any:
        x = altair.X("layer:Q", title="target layer", axis=altair.Axis(tickMinStep=1))
        base = _base().encode(x=x, y=altair.Y("value:Q", title=title), color=_series_colour(table))
        tooltip = ["series:N", "layer:Q", altair.Tooltip("value:Q", format=".4f"), "chosen:N"]
        line = base.mark_line(point={"filled": False, "size": 30}).encode(tooltip=tooltip)
        chosen = base.transform_filter("datum.chosen")
        taps = chosen.mark_point(filled=True, size=130, opacity=1).encode(tooltip=tooltip)
        rules = _base().transform_filter("datum.chosen").mark_rule(strokeDash=[4, 4], aria=False).encode(x=x)
        return altair.layer(rules, line, taps).properties(height=_HEIGHT)

    return chart


def _differences(table: DataTable) -> Any:
    base = _base().encode(
        y=altair.Y("measure:N", sort=None, title=None, axis=altair.Axis(labelLimit=240)),
        yOffset=altair.YOffset("run:N", sort=None),
        color=_colour("run", table=table),
    )
    x = altair.X("relative:Q", title="difference from the first run", axis=altair.Axis(format="+%"))
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=x,
        tooltip=[
            *("run:N", "first:N", "measure:N", "clips:Q"),
            *(_ms(name) for name in ("before", "after", "difference", "low", "high")),
        ],
    )
    rules = base.mark_rule(strokeWidth=2).encode(x="relative_low:Q", x2="relative_high:Q")
    none = altair.Chart().mark_rule(strokeDash=[4, 4], aria=False).encode(x=altair.datum(0))
    return altair.layer(none, rules, points).properties(height=_bars(table, "measure", "run"))
