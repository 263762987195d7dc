"""The options of the report and of the live view."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from alpamayo_dflash.common.options import check_above_zero, check_at_least, check_whole


@dataclass(frozen=True)
class ReportConfig:
    """Make one self-contained page of a run, or of several side by side, with tables and plots beside it.

    Attributes:
        runs: of each run the folder of a demo or an evaluation, or a summary.json, an evaluation.json or the
            results of `bench --window`; others are compared with the first.
        evaluation: one more run, before the others; the older way to name one.
        out: folder of report.html, report.md, plots; where left out `report` in the first run's folder.
        plots: also draw every chart as PNG and SVG, for light and for dark pages.
    """

    runs: Positional[tuple[Path, ...]] = ()
    evaluation: Path | None = None
    out: Path | None = None
    plots: bool = True

    def __post_init__(self) -> None:
        """Check that there is a run."""
        if not self.paths:
            raise ValueError("no run is given; name a demo's or an evaluation's folder, or its JSON file")

    @property
    def paths(self) -> tuple[Path, ...]:
        """The runs, in order."""
        return (*(() if self.evaluation is None else (self.evaluation,)), *self.runs)


@dataclass(frozen=True)
class WatchConfig:
    """Watch a run from its files alone, anybody's: layers, distill, train, evaluate or a demo's folder.

    Attributes:
        run: the output folder of a stage, or a folder of several.
        once: show it once and end; else it is shown until it is finished.
        interval_s: seconds between two looks.
        stale_min: minutes without a write after which a run is called stale; runs that write less often get
            three of their usual pauses.
        texts: how many of the last CoCs, and of the failures, are shown.
    """

    run: Positional[Path]
    once: bool = False
    interval_s: float = 2.0
    stale_min: float = 10.0
    texts: int = 5

    def __post_init__(self) -> None:
        """Check times and counts."""
        check_above_zero(interval_s=self.interval_s, stale_min=self.stale_min)
        check_whole(texts=self.texts)
        check_at_least(0, texts=self.texts)
