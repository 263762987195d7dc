"""What the page of runs is made of: its sections, its figures and the data that its script reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpamayo_dflash.report.page.data import DataTable, Figure, Value
from alpamayo_dflash.report.page.islands import visible
from alpamayo_dflash.report.page.runs import Run
from alpamayo_dflash.report.page.sections import Section, clip_list, trouble
from alpamayo_dflash.report.page.write import write_page


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """The page's sections in order, those that have something to show."""
    has_clips = any(run.evaluation is not None for run in runs)
    found = [trouble(runs)]
    if has_clips:
        found.append(Section("clips", "Clips", template="clip_list.html.j2"))
    return [section for section in found if not section.is_empty]


def write(runs: Sequence[Run], sections: Sequence[Section], out: Path) -> None:
    """Write the page of some runs' sections to an HTML file."""
    figures = {figure.name: figure for section in sections for figure in section.figures}
    clips, meta = clip_list(runs)
    data = {
        "runs": [visible(run.name) for run in runs],
        "themes": {},
        "figures": {name: _figure(figure) for name, figure in figures.items()},
        "clips": _table(clips) | {"meta": meta},
    }
    title = " beside ".join(run.name for run in runs)
    write_page(runs, {"title": title, "sections": sections, "page_data": data}, out)


def _figure(figure: Figure) -> dict[str, Any]:
    return {"spec": figure.spec, **_table(figure.table)}


def _table(table: DataTable) -> dict[str, Any]:
    """A table for the browser, every character of its texts visible."""
    return {
        "title": visible(table.title),
        "columns": [
            {"key": each.key, "label": visible(each.label), "kind": each.kind, "digits": each.digits}
            for each in table.columns
        ],
        "rows": [[_seen(value) for value in row] for row in table.rows],
        "links": table.links,
    }


def _seen(value: Value) -> Value:
    return visible(value) if isinstance(value, str) else value
