"""Writes the cards' windows that ship with the package: `python -m tests.helpers.window_cards`.

Run it after `docs/results/window_*.json` has changed.
"""

from pathlib import Path

from alpamayo_dflash.bench.cards import cards_of, cards_path
from alpamayo_dflash.common.artefacts import write_json

RESULTS = Path(__file__).parents[2] / "docs" / "results"


if __name__ == "__main__":
    write_json(cards_path(), cards_of(RESULTS.glob("window_*.json")))
