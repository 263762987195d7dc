"""The options of the report and of the live view."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from alpamayo_dflash.common.options import check_above_zero, check_at_least, check_whole


@dataclass(frozen=True)
class ReportConfig:
    """Make tables, plots and a self-contained page from an evaluation's JSON; of a window's, table and bars.

    Attributes:
        evaluation: evaluation.json of `evaluate`, summary.json of `demo`, or the results of `bench --window`.
        out: folder of report.html, report.md and the plots; the JSON file's own folder where left out.
    """

    evaluation: Path
    out: Path | None = None


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
