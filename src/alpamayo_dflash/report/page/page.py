"""What the page of runs is made of: its sections, its figures and the data that its script reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpamayo_dflash.report.page.charts import (
    acceptance_figures,
    difference_figures,
    error_figures,
    layer_figures,
    source_figures,
    theme,
    time_figures,
    training_figures,
)
from alpamayo_dflash.report.page.compare import difference_table, missing, text_counts, unlike
from alpamayo_dflash.report.page.data import DataTable, Figure
from alpamayo_dflash.report.page.islands import visible
from alpamayo_dflash.report.page.runs import Run
from alpamayo_dflash.report.page.sections import Finding, Section, clip_list, trouble
from alpamayo_dflash.report.page.summary import arms, bench_figures, origins, summary, world
from alpamayo_dflash.report.page.tallies import recorded
from alpamayo_dflash.report.page.write import write_page


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """The page's sections in order, those that have something to show."""
    evaluated = [run for run in runs if run.evaluation is not None]
    series = [each for run in runs for each in run.series]
    found = [trouble(runs)]
    if evaluated:
        found += [
            Section("summary", "Summary", tables=(summary(series), arms(series))),
            *([comparison(evaluated)] if len(evaluated) > 1 else []),
            Section("clips", "Clips", template="clip_list.html.j2"),
        ]
    found += [
        Section("time", "Time", tables=tuple(bench_figures(runs)), figures=tuple(time_figures(runs))),
        Section("acceptance", "Acceptance", figures=tuple(acceptance_figures(runs))),
        Section(
            "sources", "Where tokens come from", texts=unrecorded(runs), figures=tuple(source_figures(runs))
        ),
        Section("errors", "Trajectories", figures=tuple(error_figures(runs))),
        Section("training", "Training", figures=tuple(training_figures(runs))),
        Section("layers", "Layers", figures=tuple(layer_figures(runs))),
        Section("world", "World", tables=tuple(world(runs))),
        Section("origin", "Origin", tables=(origins(runs),)),
    ]
    return [section for section in found if not section.is_empty]


def unrecorded(runs: Sequence[Run]) -> tuple[str, ...]:
    """Which evaluations do not say where their tokens come from."""
    return tuple(
        f"Of {each.name} it was not recorded where tokens come from."
        for run in runs
        for each in run.series[:1]
        if not recorded(each.rows) and not each.result.get("sources")
    )


def comparison(runs: Sequence[Run]) -> Section:
    """Each run beside the first: differences on the clips that both have, and the clips that are missing."""
    first, others = runs[0], runs[1:]
    lacking = missing(runs)
    findings = [Finding("note", text) for text in unlike(first, others)]
    if lacking.rows:
        findings.append(
            Finding("bad", f"{len(lacking.rows)} times a clip of one run is missing in another.", lacking)
        )
    else:
        findings.append(Finding("good", "all runs have the same clips."))
    figures = tuple(difference_figures(difference_table(first, others)))
    tables = (text_counts(first, others),)
    return Section("compare", "Compared", findings=tuple(findings), tables=tables, figures=figures)


def write(runs: Sequence[Run], sections: Sequence[Section], out: Path) -> None:
    """Write the page of some runs' sections to an HTML file."""
    figures = {figure.name: figure for section in sections for figure in section.figures}
    clips, meta = clip_list(runs)
    data = {
        "runs": [visible(run.name) for run in runs],
        "themes": {"light": theme("light"), "dark": theme("dark")},
        "figures": {name: _figure(figure) for name, figure in figures.items()},
        "clips": _table(clips) | {"meta": meta},
    }
    title = " beside ".join(run.name for run in runs)
    write_page(runs, {"title": title, "sections": sections, "page_data": data}, out)


def _figure(figure: Figure) -> dict[str, Any]:
    return {"spec": figure.spec, **_table(figure.table)}


def _table(table: DataTable) -> dict[str, Any]:
    """A table for the browser."""
    columns = [
        {name: getattr(each, name) for name in ("key", "label", "kind", "digits")} for each in table.columns
    ]
    return {"title": table.title, "columns": columns, "rows": table.rows, "links": table.links}
