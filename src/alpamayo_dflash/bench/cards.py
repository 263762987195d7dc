"""What `bench --window` gave on the cards whose results the repository keeps, for a user to compare with.

They ship as `cards.json`, because an installed package has no `docs/results`; a test holds the two equal, and
`python -m tests.helpers.window_cards` writes the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import read_json


def cards_path() -> Path:
    """The shipped file."""
    return Path(__file__).parent / "cards.json"


def read_cards() -> dict[str, Any]:
    """The cards by name: `ours_1`, `ours_6` and `floor`, milliseconds by part, and `result`, their file."""
    return read_json(cards_path())


def cards_of(results: Iterable[Path]) -> dict[str, Any]:
    """What `cards.json` must hold, from results of `bench --window`; those without `parts` are left out."""
    found = {}
    for path in sorted(results):
        result = read_json(path)
        if "parts" in result:
            found[result["gpu"]["name"]] = card_of(result) | {"result": path.name}
    return found


def card_of(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """One card's milliseconds, from a results object of `bench --window`."""
    return {arm: result["parts"][arm] for arm in ("ours_1", "ours_6", "floor") if arm in result["parts"]}
