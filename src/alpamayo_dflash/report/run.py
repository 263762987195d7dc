"""The stage: the page of a run or of several, its tables as Markdown and its charts as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import write_text
from alpamayo_dflash.report.config import ReportConfig
from alpamayo_dflash.report.page.runs import Run, read_runs
from alpamayo_dflash.report.page.sections import Section
from alpamayo_dflash.report.tables import Table, window

_SHOWN = "-light.png"
"""Of a chart's four pictures the one that Markdown shows."""


def run(config: ReportConfig) -> dict[str, Any]:
    """Write report.html (self-contained), report.md and the plots.

    Raises:
        ValueError: a run is missing or damaged.
        MissingPackageError: a library of the page is not installed.
    """
    runs = read_runs(config.paths)
    folder = config.out or runs[0].path.parent / "report"
    return write_report(runs, folder, plots=config.plots)


def write_report(runs: Sequence[Run], folder: Path, *, plots: bool = True) -> dict[str, Any]:
    """Write the page of runs, its Markdown and its plots into a folder; of a window window.md and window.png.

    Returns:
        `report`, `markdown` and the folder `plots`, null where none were asked for; how many `runs` and
        `clips` are on the page; of a window the paths `window` and `window_plot`.
    """
    from alpamayo_dflash.report.page.page import sections_of, write
    from alpamayo_dflash.report.page.plots import write_plots

    sections, page, text = sections_of(runs), folder / "report.html", folder / "report.md"
    figures = [figure for section in sections for figure in section.figures]
    pictures = write_plots(figures, folder / "plots") if plots else []
    write(runs, sections, page)
    write_text(text, _markdown(sections, [path for path in pictures if path.name.endswith(_SHOWN)], folder))
    benches = [each for each in runs if each.bench is not None]
    windows = write_window(benches[0], folder) if benches and plots else {}
    return {
        "report": str(page),
        "markdown": str(text),
        "plots": str(folder / "plots") if plots else None,
        "runs": len(runs),
        "clips": sum(len(each.rows) for each in runs),
        **windows,
    }


def write_window(bench: Run, folder: Path) -> dict[str, Any]:
    """Write the table of a window's parts beside other cards', and its bars; returns the paths."""
    from alpamayo_dflash.report.page.charts import time_figures
    from alpamayo_dflash.report.page.plots import drawn, write_png

    assert bench.bench is not None, "the results of bench --window"
    table, bars, text = window(bench.bench), folder / "window.png", folder / "window.md"
    assert table is not None, "there are parts"
    write_png(drawn(time_figures([bench])[:1], "both"), bars)
    write_text(text, f"# {table.title}\n\n{table.markdown()}\n![{table.title}]({bars.name})\n")
    return {"window": str(text), "window_plot": str(bars)}


def _markdown(sections: Sequence[Section], pictures: Sequence[Path], folder: Path) -> str:
    """What the page says, as Markdown: its findings, its tables and its plots."""
    parts = []
    for section in sections:
        parts.append(f"## {section.title}\n")
        parts += [f"- {each.word} {_line(each.text)}" for each in section.findings]
        parts += [""] if section.findings else []
        tables = [*(each.table for each in section.findings if each.table), *section.tables]
        parts += [_table(table.as_text()) for table in tables]
        names = {figure.name for figure in section.figures}
        for path in pictures:
            if path.name.removesuffix(_SHOWN) in names:
                parts.append(f"![{path.stem}]({path.relative_to(folder).as_posix()})\n")
    return "\n".join(["# Report\n", *parts])


def _table(table: Table) -> str:
    return f"### {_line(table.title)}\n\n{table.markdown()}"


def _line(text: str) -> str:
    """Text of others as a line of Markdown that begins nothing of its own."""
    return text.replace("<", "&lt;").replace("\n", " ")
