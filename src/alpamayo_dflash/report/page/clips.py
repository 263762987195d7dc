"""The clips' own views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpamayo_dflash.report.page.runs import Run


def clips_context(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """What the template of the clips' views needs."""
    return {}
