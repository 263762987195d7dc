"""The stage: tables, plots and a page from an evaluation's or a window's JSON object, and nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import read_json, write_text
from alpamayo_dflash.report.config import ReportConfig
from alpamayo_dflash.report.evaluation import read_evaluation, read_window
from alpamayo_dflash.report.plots import all_plots, plot_window
from alpamayo_dflash.report.tables import Table, all_tables, sources, window

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
code { overflow-wrap: anywhere; }
"""


def run(config: ReportConfig) -> dict[str, Any]:
    """Write report.html (self-contained), report.md and the plots; of a window window.md and window.png.

    Raises:
        ValueError: the file is missing or is neither's JSON object.
    """
    folder = config.out or config.evaluation.parent
    if "parts" in read_json(config.evaluation):
        return write_window(read_window(config.evaluation), folder)
    return write_report(read_evaluation(config.evaluation), folder)


def write_window(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the table and the bars of a window's JSON object into a folder; returns the paths."""
    table, bars, text = window(result), folder / "window.png", folder / "window.md"
    assert table is not None, "there are parts"
    plot_window(result, bars)
    write_text(text, f"# {table.title}\n\n{table.markdown()}\n![{table.title}]({bars.name})\n")
    return {"markdown": str(text), "plots": [str(bars)]}


def write_report(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the report of an evaluation's JSON object into a folder; returns the paths."""
    tables = [*all_tables(result), sources(result)]
    plots = all_plots(result, folder / "plots")
    page, text = folder / "report.html", folder / "report.md"
    write_text(page, _page(result, tables, plots))
    write_text(text, _markdown(tables, plots, folder))
    return {"report": str(page), "markdown": str(text), "plots": [str(path) for path in plots]}


def _markdown(tables: Sequence[Table], plots: Sequence[Path], folder: Path) -> str:
    sections = [f"## {table.title}\n\n{table.markdown()}" for table in tables]
    images = [f"![{path.stem}]({path.relative_to(folder).as_posix()})\n" for path in plots]
    return "\n".join(["# Evaluation\n", *sections, *images])


def _page(result: Mapping[str, Any], tables: Sequence[Table], plots: Sequence[Path]) -> str:
    images = "\n".join(_inline(path) for path in plots)
    body = "".join(table.html() for table in tables)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Evaluation</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Evaluation</h1>\n{body}\n{images}\n"
        f"{_examples(result)}\n{_origin(result)}\n</body>\n</html>\n"
    )


def _inline(plot: Path) -> str:
    """A plot as HTML that holds the picture itself."""
    data = base64.b64encode(plot.read_bytes()).decode()
    return f'<p><img alt="{plot.stem}" src="data:image/png;base64,{data}"></p>'


def _examples(result: Mapping[str, Any]) -> str:
    """The first clips' CoCs."""
    rows = result.get("clip_rows", [])[:10]
    items = "\n".join(f"<li>{html.escape(row['coc'][0])}</li>" for row in rows if row["coc"])
    return f"<h2>First CoCs</h2>\n<ul>\n{items}\n</ul>" if items else ""


def _origin(result: Mapping[str, Any]) -> str:
    """Where the numbers come from, from the artefact's provenance."""
    origin = result.get("provenance")
    if not origin:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return (
        f"<h2>Where it comes from</h2>\n<p>{html.escape(origin['device'])}; {html.escape(versions)}; "
        f"revision {html.escape(str(origin['revision']))}; {html.escape(origin['created'])}.<br>"
        f"<code>{html.escape(origin['command'])}</code></p>"
    )
