"""The store of rows: continued, begun anew, and never confused by a cut line."""

from __future__ import annotations

import json
from pathlib import Path

from alpamayo_dflash.evaluate.rows import ClipRow, RowStore


def row(clip_id: str) -> ClipRow:
    return {
        "clip_id": clip_id,
        "prompt_tokens": 1,
        "coc": [""],
        "arms": {},
        "acceptance": {"tokens_after_first": 1, "passes": 1, "drafted": 7, "accepted": 0},
    }


def test_a_store_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    store = RowStore(path, {"draft": Path("d"), "block": 8})
    store.add(row("a"))
    again = RowStore(path, {"draft": Path("d"), "block": 8})
    assert "a" in again
    assert "b" not in again
    again.add(row("b"))
    assert [each["clip_id"] for each in RowStore(path, {"draft": "d", "block": 8}).rows()] == ["a", "b"]


def test_another_head_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowStore(path, {"block": 8}).add(row("a"))
    assert len(RowStore(path, {"block": 16})) == 0


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    store = RowStore(path, {"block": 8})
    store.add(row("a"))
    store.add(row("b"))
    text = path.read_text()
    path.write_text(text[:-20])
    again = RowStore(path, {"block": 8})
    assert [each["clip_id"] for each in again.rows()] == ["a"]
    again.add(row("b"))
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3
