"""Tables, and what `report` writes, from JSON alone."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alpamayo_dflash.report.config import ReportConfig
from alpamayo_dflash.report.page.charts import Ground, time_figures
from alpamayo_dflash.report.page.measures import WINDOW_ARMS
from alpamayo_dflash.report.page.plots import drawn, write_png
from alpamayo_dflash.report.page.runs import read_runs
from alpamayo_dflash.report.run import run
from alpamayo_dflash.report.tables import (
    WORLD_FIGURES,
    Table,
    all_tables,
    bench_tables,
    comparison,
    quality,
    window,
)

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


def test_markdown_keeps_text_as_text() -> None:
    table = Table("t", ("a",), (("x|<b>&\ny",),))
    assert table.markdown() == "| a |\n|---|\n| x\\|&lt;b>&amp; y |\n"


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


def pictures(written: dict[str, Any]) -> set[str]:
    """The charts that were drawn; each as four files."""
    files = {path.name for path in Path(written["plots"]).iterdir()}
    names = {name.removesuffix("-light.svg") for name in files if name.endswith("-light.svg")}
    assert files == {f"{name}-{end}" for name in names for end in _ENDINGS}
    return names


_ENDINGS = ("light.png", "light.svg", "dark.png", "dark.svg")


def test_dflash_alone_makes_a_report(tmp_path: Path) -> None:
    alone = copy.deepcopy(evaluation())
    alone["arms"] = {"dflash": alone["arms"]["dflash"]}
    alone["speedup"] = None
    alone["lossless"]["of"] = 0
    for row in alone["clip_rows"]:
        row["arms"] = {"dflash": row["arms"]["dflash"]}
    source = tmp_path / "evaluation.json"
    source.write_text(json.dumps(alone))
    written = run(ReportConfig((source,), plots=False))
    assert written["plots"] is None and not (tmp_path / "report" / "plots").exists()
    page = Path(written["report"]).read_text()
    assert "nothing says whether the texts are the target&#39;s own" in page
    assert 'id="figure-time-parts"' in page and 'id="figure-speedup"' not in page


def test_report_is_whole(tmp_path: Path) -> None:
    source = tmp_path / "evaluation.json"
    source.write_text(json.dumps(evaluation()))
    written = run(ReportConfig(evaluation=source, out=tmp_path / "report"))
    names = pictures(written)
    assert names == {
        *("time-parts", "decode-by-tokens", "speedup", "clip-lengths", "manoeuvres", "training-acceptance"),
    }
    text = Path(written["markdown"]).read_text()
    assert all(f"](plots/{name}-light.png)" in text for name in names)
    assert "| x | no &lt;frames> |" in text
    assert [written["runs"], written["clips"]] == [1, 3]


def test_what_is_not_an_evaluation_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "other.json"
    source.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"other\.json: holds a list, not an object"):
        run(ReportConfig((source,)))
    source.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not an evaluation"):
        run(ReportConfig((source,)))
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
    written = run(ReportConfig((source,), out=tmp_path / "report", plots=False))
    said = "an audit decoded 3 clips again: 6 texts equal, 0 part at near-ties"
    assert said in Path(written["report"]).read_text() and said in Path(written["markdown"]).read_text()


PARTS = ("preprocess", "vision", "prompt", "decode", "action", "whole")


def window_results() -> dict[str, Any]:
    def times(*ms: float) -> dict[str, float]:
        return dict(zip(PARTS, ms, strict=True))

    return {
        "parts": {
            "ours_1": times(4.0, 28.0, 72.0, 15.0, 24.0, 144.0),
            "ours_6": times(4.0, 28.0, 72.0, 23.0, 53.0, 181.0),
            "transformers_1": times(75.0, 63.0, 101.0, 400.0, 340.0, 990.0),
            "compiled_1": {"decode": 110.0},
            "floor": times(2.0, 14.7, 57.1, 10.0, 0.0, 83.8),
        },
        "gpu": {"name": "NVIDIA H100"},
        "cards": {"NVIDIA H200": {"ours_1": {"decode": 14.5, "whole": 140.0}}},
    }


def test_a_windows_parts_stand_beside_floors_and_other_cards() -> None:
    table = window(window_results())
    assert table is not None
    assert table.header == (
        *("part", "NVIDIA H100, here", "floor", "over floor", "NVIDIA H200, measured before"),
    )
    assert [row[0] for row in table.rows] == list(PARTS)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["decode"] == ("15.00", "10.00", "1.50 ×", "14.50")
    assert rows["action"] == ("24.00", "0.00", "–", "–")  # no ratio to nothing, no card with that part
    bare = window({"parts": {"ours_1": {"decode": 3.0}}, "gpu": None})
    assert bare is not None and bare.header == ("part", "CPU, here", "floor", "over floor")
    assert window({}) is None
    benched = {"floors": {"read_bytes_per_s": 1.0, "product_flop_per_s": 1.0, "rows": []}}
    benched |= {"figures": {}, "replayed": [], "coc_lengths": []}
    assert table.title not in [each.title for each in bench_tables(benched)]
    assert bench_tables(benched | window_results())[0] == table


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    red, green, blue = (int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))
    weighted = zip((0.2126, 0.7152, 0.0722), (red, green, blue), strict=True)
    return sum(share * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for share, c in weighted)


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_windows_bars_are_what_was_measured(tmp_path: Path) -> None:
    source = tmp_path / "window.json"
    source.write_text(json.dumps(window_results()))
    drawing = drawn(time_figures(read_runs([source])), "both")
    # Vega writes into each bar what it stands for.
    found = re.findall(r'aria-label="ms: ([\d.]+); part: (\w+);[^"]*arm: ([^";]+)', drawing)
    bars = {(arm, part): float(ms) for ms, part, arm in found}
    parts = window_results()["parts"]
    wanted = {
        (WINDOW_ARMS[arm], part): ms
        for arm in ("ours_1", "transformers_1", "compiled_1", "floor")
        for part, ms in parts[arm].items()
        if part != "whole"
    }
    assert bars == wanted
    assert all(f"{name} ms in all" in drawing for name in ("this project: 144", "floor: 84"))


@pytest.mark.parametrize(("ground", "paper"), [("both", "#ffffff"), ("both", "#0d1117"), ("dark", "#0d1117")])
def test_a_windows_bars_are_legible(tmp_path: Path, ground: Ground, paper: str) -> None:
    """Contrasts as WCAG asks: 3 for shapes, and 4 for text, since one grey cannot have 4.5 on both."""
    source = tmp_path / "window.json"
    source.write_text(json.dumps(window_results()))
    drawing = drawn(time_figures(read_runs([source])), ground)
    texts = re.findall(r'<text[^>]* fill="(#[0-9a-f]{6})"', drawing)
    bars = re.findall(r'aria-roledescription="bar"[^>]* fill="(#[0-9A-Fa-f]{6})"', drawing)
    assert len(texts) > 5 and len(bars) == 16
    assert min(contrast(colour, paper) for colour in texts) >= 4
    # Okabe and Ito's orange, the fourth arm's, is paler than that on white.
    assert min(contrast(colour, paper) for colour in bars if colour != "#E69F00") >= 3
    write_png(drawing, tmp_path / "window.png")
    from PIL import Image

    with Image.open(tmp_path / "window.png") as image:
        assert image.convert("RGBA").getpixel((1, 1))[3] == 0  # the page's own ground shows


def test_a_window_is_reported(tmp_path: Path) -> None:
    source = tmp_path / "window.json"
    source.write_text(json.dumps(window_results()))
    written = run(ReportConfig((source,), out=tmp_path / "report"))
    table = window(window_results())
    assert table is not None and table.markdown() in Path(written["window"]).read_text()
    assert Path(written["window_plot"]).name == "window.png" and Path(written["window_plot"]).is_file()
    assert pictures(written) == {"window-0"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"floor": {"vision": 1.0}}, "lacks ours_1"),
        ({"ours_1": {"visoin": 1.0}}, "'visoin'"),
        ({"ours_1": {"vision": "1"}}, "vision"),
        ({"ours_1": {"vision": -1.0}}, "ours_1.vision"),
        ([], "parts"),
    ],
)
def test_a_window_that_cannot_be_shown_is_refused(tmp_path: Path, parts: Any, message: str) -> None:
    source = tmp_path / "window.json"
    source.write_text(json.dumps({"parts": parts}))
    with pytest.raises(ValueError, match=rf"window\.json: .*{message}"):
        run(ReportConfig((source,)))
    assert list(tmp_path.iterdir()) == [source]
