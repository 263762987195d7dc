"""Tables, plots and a page, from a stage's JSON alone; nothing here loads a model."""

from alpamayo_dflash.report.config import ReportConfig
from alpamayo_dflash.report.tables import Table, all_tables, bench_tables, comparison

__all__ = ["ReportConfig", "Table", "all_tables", "bench_tables", "comparison"]
