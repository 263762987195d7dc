"""Tables, plots and the page from JSON alone."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alpamayo_dflash.report.config import ReportConfig
from alpamayo_dflash.report.run import run
from alpamayo_dflash.report.tables import WORLD_FIGURES, Table, all_tables, comparison, quality

TIMES = {"prefill_ms": 50.0, "decode_ms": 100.0, "action_ms": 5.0, "total_ms": 155.0, "tokens": 40}


def evaluation() -> dict[str, Any]:
    arms = {
        "transformers": TIMES | {"decode_ms": 150.0, "tokens_per_s": 133.3},
        "autoregressive": TIMES | {"tokens_per_s": 200.0},
        "dflash": TIMES | {"decode_ms": 40.0, "tokens_per_s": 500.0},
    }
    rows = [
        {
            "clip_id": f"clip-{number}",
            "prompt_tokens": 10,
            "coc": ["Keep <distance> & go."],
            "arms": {arm: {key: each[key] for key in TIMES} for arm, each in arms.items()},
            "acceptance": {"tokens_after_first": 19, "passes": 4, "drafted": 28, "accepted": 15},
        }
        for number in range(3)
    ]
    return {
        "clips": {
            "attempted": 4,
            "done": 3,
            "failed": 1,
            "failures": [{"clip_id": "x", "error": "no <frames>"}],
        },
        "lossless": {
            "greedy_identical": 3,
            "sampled_identical": 3,
            "autoregressive_equals_transformers": 3,
            "of": 3,
        },
        "acceptance_length": 4.75,
        "acceptance_rate": 0.5357,
        "arms": arms,
        "speedup": {
            "decode_vs_autoregressive": 2.5,
            "decode_vs_transformers": 3.75,
            "total_vs_autoregressive": 1.6,
            "total_vs_transformers": 2.1,
        },
        "trajectory": {"min_ade_m": 0.61, "constant_velocity_min_ade_m": 1.9, "of": 3},
        "coc_names": {"manoeuvre": 0.95, "cause": 0.93, "both": 0.92, "of": 3},
        "decode_parts": {
            part: {"ms": 8.0, "share": 0.2} for part in ("draft", "verify", "sampling", "cache", "other")
        },
        "world": dict.fromkeys(WORLD_FIGURES, 0.4),
        "world_here": {"distinct": 0.5},
        "training": {"evaluations": [{"step": step, "acceptance_length": 1.0 + step} for step in range(3)]},
        "clip_rows": rows,
    }


def test_markdown_has_a_rule_and_one_line_a_row() -> None:
    table = Table("t", ("a", "b"), (("x", "1"), ("y", "2")))
    assert table.markdown() == "| a | b |\n|---|---:|\n| x | 1 |\n| y | 2 |\n"


def test_html_is_escaped() -> None:
    assert "no &lt;frames&gt;" in "".join(table.html() for table in all_tables(evaluation()))


def test_comparison_shows_each_arm_and_the_speed_up_against_it() -> None:
    cells = {row[0]: row for row in comparison(evaluation()).rows}
    assert cells["transformers"][2] == "150.0"
    assert cells["autoregressive"][6] == "2.50 ×"
    assert cells["DFlash"][6] == "–"


def test_tables_of_what_is_not_there_are_left_out() -> None:
    bare = evaluation()
    for name in ("world", "decode_parts", "trajectory", "coc_names"):
        bare[name] = None
    bare["clips"]["failures"] = []
    assert [table.title.split()[0].lower() for table in all_tables(bare)] == ["times", "acceptance"]


def test_dflash_alone_makes_a_report(tmp_path: Path) -> None:
    alone = copy.deepcopy(evaluation())
    alone["arms"] = {"dflash": alone["arms"]["dflash"]}
    alone["speedup"] = None
    alone["lossless"]["of"] = 0
    for row in alone["clip_rows"]:
        row["arms"] = {"dflash": row["arms"]["dflash"]}
    source = tmp_path / "evaluation.json"
    source.write_text(json.dumps(alone))
    assert len(run(ReportConfig(source))["plots"]) == 5


def test_report_is_whole(tmp_path: Path) -> None:
    source = tmp_path / "evaluation.json"
    source.write_text(json.dumps(evaluation()))
    written = run(ReportConfig(source, out=tmp_path / "report"))
    names = {path.name for path in (tmp_path / "report" / "plots").iterdir()}
    assert names == {
        *("times.png", "decode_by_length.png", "acceptance.png", "speedup.png", "decode_parts.png"),
        "training.png",
    }
    page = Path(written["report"]).read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert "Keep &lt;distance&gt; &amp; go." in page
    assert "plots/times.png" in Path(written["markdown"]).read_text()


def test_what_is_not_an_evaluation_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "other.json"
    source.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"other\.json: holds a list, not an object"):
        run(ReportConfig(source))
    source.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not an evaluation"):
        run(ReportConfig(source))
    assert list(tmp_path.iterdir()) == [source]


def test_report_imports_no_torch() -> None:
    code = "import sys, alpamayo_dflash.report.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_brackets_in_cells_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=80).print(Table("T", ("clip", "reason"), (("a", "o[/x]: [red]no[/red] file"),)).rich())
    assert "o[/x]: [red]no[/red] file" in capsys.readouterr().out


def test_an_audit_is_shown_and_what_it_found() -> None:
    audited = evaluation()
    found = {"clips": 3, "texts": 6, "equal": 5, "near_ties": 1, "differences": [], "failures": []}
    audited["audit"] = found | {"passed": True}
    row = ("texts of 3 audited clips equal / near-tie / wrong", "5 / 1 / 0")
    assert row in quality(audited).rows
    assert not any("audit" in table.title for table in all_tables(audited))
    place = {"piece": "a", "logit": 1.0, "wide_logit": 1.0, "score": None, "wide_score": None}
    differences = [
        {"clip_id": "clip-1", "sample": 0, "kind": "token", "position": 4, "message": "long",
         "stored": place | {"token": None}, "own": place | {"token": 7}},
        {"clip_id": "clip-2", "sample": 1, "kind": "coc", "message": "other <characters>"},
    ]  # fmt: skip
    failures = [{"clip_id": "clip-3", "error": "away"}]
    audited["audit"] = found | {"differences": differences, "failures": failures, "passed": False}
    table = next(table for table in all_tables(audited) if table.title == "The audit failed")
    assert table.rows == (
        ("clip-1", "0", "4", "stored the end, the target's own 7 a"),
        ("clip-2", "1", "–", "other <characters>"),
        ("clip-3", "–", "–", "not decoded again: away"),
    )


def test_an_audit_stands_in_the_report(tmp_path: Path) -> None:
    source = tmp_path / "evaluation.json"
    found = {"clips": 3, "texts": 6, "equal": 6, "near_ties": 0, "differences": [], "failures": []}
    source.write_text(json.dumps(evaluation() | {"audit": found | {"passed": True}}))
    written = run(ReportConfig(source, out=tmp_path / "report"))
    assert "texts of 3 audited clips" in Path(written["report"]).read_text()
    assert "6 / 0 / 0" in Path(written["markdown"]).read_text()
