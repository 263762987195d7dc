"""The options of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportConfig:
    """Make tables, plots and a self-contained page from an evaluation's JSON; of a window's, table and bars.

    Attributes:
        evaluation: evaluation.json of `evaluate`, summary.json of `demo`, or the results of `bench --window`.
        out: folder of report.html, report.md and the plots; the JSON file's own folder where left out.
    """

    evaluation: Path
    out: Path | None = None
