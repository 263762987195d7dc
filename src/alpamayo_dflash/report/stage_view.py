"""A look at a run, drawn for a terminal: the stage that runs at length, the others in a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from alpamayo_dflash.report.look import Look, Stage
from alpamayo_dflash.report.stages.reading import Named, Reading
from alpamayo_dflash.report.terminal import clock, duration, sparkline, visible

_STYLES = {"running": "green", "finished": "bold green", "stale": "bold yellow", "stopped": "bold yellow"}
_GIB = 2**30


def view_of(look: Look, width: int) -> RenderableType:
    """The whole view.

    Args:
        look: at the run.
        width: of the terminal, in characters.
    """
    front = look.stages[look.front]
    parts: list[RenderableType] = []
    if len(look.stages) > 1:
        parts.append(_others(look))
    parts.append(_heading(front))
    parts.append(_lines(front, look.at, width))
    if look.state == "waiting":
        parts.append(Text("the next stage has not begun", style="yellow"))
    return Group(*parts)


def _others(look: Look) -> Table:
    """A line a stage."""
    table = Table.grid(padding=(0, 2))
    for place, stage in enumerate(look.stages):
        if place != look.front:
            reading = stage.reading
            amount = "nothing written yet" if reading is None else _amount(reading)
            name, state = visible(stage.folder.name, 60), Text(stage.state, style=_style(stage))
            table.add_row(Text(name), state, Text(amount), Text(_failed(reading), style="red"))
    return table


def _heading(stage: Stage) -> Text:
    kind = "begun" if stage.reading is None else stage.reading.kind
    heading = Text.assemble((f"\n{kind}", "bold"), "  ", visible(str(stage.folder)), "  ")
    heading.append(stage.state, style=_style(stage))
    return heading.append(f"  {stage.remark}" if stage.remark else "")


def _style(stage: Stage) -> str:
    return _STYLES.get(stage.state, "yellow")


def _amount(reading: Reading) -> str:
    """How much is done, in words."""
    if reading.total is None:
        return f"{reading.done:,} {reading.unit}"
    share = f"  {reading.done / reading.total:.0%}" if reading.total else ""
    return f"{reading.done:,} of {reading.total:,} {reading.unit}{share}"


def _failed(reading: Reading | None) -> str:
    return f"{reading.failed} clips failed" if reading is not None and reading.failed else ""


def _lines(stage: Stage, now: float, width: int) -> Table:
    """The stage at length: a name and what there is to it, line by line."""
    table = Table.grid(padding=(0, 2), expand=False)
    for name, shown in (*_times(stage, now), *_content(stage.reading, width)):
        table.add_row(Text(name, style="dim"), shown)
    return table


def _times(stage: Stage, now: float) -> Iterator[tuple[str, RenderableType]]:
    """Progress, rate and moments."""
    reading = stage.reading
    if reading is not None:
        yield "progress", Text(_amount(reading))
        if reading.total:
            yield "", ProgressBar(total=reading.total, completed=min(reading.done, reading.total), width=40)
    if stage.pace is not None and reading is not None:
        yield "rate", Text(f"{_rate(stage.pace.per_s, reading.unit)}, by {stage.pace.source}")
    if stage.owners:
        since, owner = min(owner.since for owner in stage.owners), stage.owners[0]
        who = f"process {owner.pid} on {visible(owner.host, 60)}" if owner.host else "a process"
        more = f" and {len(stage.owners) - 1} more" if len(stage.owners) > 1 else ""
        yield "began", Text(f"{clock(since, now)}, {duration(now - since)} ago, by {who}{more}")
    yield "last write", Text(f"{clock(stage.last_write, now)}, {duration(now - stage.last_write)} ago")
    if stage.expected_end is not None:
        left = stage.expected_end - now
        when = f"{clock(stage.expected_end, now)}, in {duration(left)}" if left > 0 else "any moment"
        yield "expected end", Text(when)


def _content(reading: Reading | None, width: int) -> Iterator[tuple[str, RenderableType]]:
    """Curves, figures, failures and texts."""
    if reading is None:
        return
    for name, values in reading.curves.items():
        if values:
            yield visible(name, 40), Text(f"{values[-1]:.3f}  {sparkline(values)}")
    if reading.figures:
        yield "figures", Text(" · ".join(_figure(*each) for each in reading.figures.items()))
    if reading.failed is not None:
        yield "failed", Text(f"{reading.failed} clips", style="red" if reading.failed else "")
    yield from _named("failures", reading.failures, width)
    yield from _named("last CoCs", reading.texts, width)
    for note in reading.notes:
        yield "", Text(note, style="dim")


def _rate(per_s: float, unit: str) -> str:
    """A rate over the shortest time in which one is done."""
    spans = (("a second", 1), ("a minute", 60), ("an hour", 3600))
    span, seconds = next((each for each in spans if per_s * each[1] >= 1), spans[-1])
    return f"{per_s * seconds:.3g} {unit} {span}"


def _figure(name: str, value: float) -> str:
    if name == "bytes":
        return f"{value / _GIB:.2f} GiB"
    number = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
    return f"{name.replace('_', ' ')} {number}"


def _named(heading: str, entries: Sequence[Named], width: int) -> Iterator[tuple[str, RenderableType]]:
    """Texts of others about clips, each in lines of its own."""
    for place, (clip_id, text) in enumerate(entries):
        line = Text(f"{visible(clip_id, 12)}  ", style="dim").append(visible(text, 4 * width), style="none")
        yield ("" if place else heading), line
