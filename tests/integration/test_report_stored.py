"""Evaluations that earlier versions wrote make a page."""

import json
from pathlib import Path

import pytest

from alpamayo_dflash.cli.main import main

STORED = Path(__file__).parents[1] / "data" / "stored"
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    ("evaluation", "recorded"),
    [(STORED / "evaluation" / "evaluation.json", False), (RESULTS / "demo_tiny.json", True)],
)
def test_a_stored_evaluation_is_reported(evaluation, recorded, tmp_path, capsys):
    assert main(["report", "--evaluation", str(evaluation), "--out", str(tmp_path)]) == 0
    page = Path(json.loads(capsys.readouterr().out)["report"]).read_text()
    assert ("not recorded" in page) is not recorded
