"""What every artefact is written with."""

import shutil

import pytest

from alpamayo_dflash.common.artefacts import (
    atomic_file,
    clear_temporaries,
    git_revision,
    read_json,
    write_json,
)


def test_lists_of_numbers_take_one_line_and_nothing_changes(tmp_path):
    path = tmp_path / "value.json"
    value = {
        "numbers": [1, 2.5, -3e-07],
        "nested": [[1, 2], [3]],
        "words": ["1\n 2", "[\n 1,\n 2\n]"],
        "mixed": [1, None, True],
        "empty": [],
    }
    write_json(path, value)
    assert read_json(path) == value
    lines = path.read_text().splitlines()
    assert ' "numbers": [1, 2.5, -3e-07],' in lines
    assert "  [1, 2]," in lines


def test_what_is_not_json_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "value.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_the_revision_is_the_checkouts_and_outside_of_one_what_is_said(monkeypatch):
    monkeypatch.setenv("ALPAMAYO_DFLASH_REVISION", "f" * 40)
    assert git_revision() != "f" * 40  # the tests run in a checkout
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert git_revision() == "f" * 40
    monkeypatch.delenv("ALPAMAYO_DFLASH_REVISION")
    assert git_revision() is None


def test_what_killed_writes_leave_is_cleared_and_nothing_else(tmp_path):
    (tmp_path / "shards").mkdir()
    with atomic_file(tmp_path / "shards" / "rank0-0.safetensors") as temporary:
        left = temporary.read_bytes()
    temporary.write_bytes(left)  # as if the writer had been killed
    others = [tmp_path / name for name in (".env.template", ".gitignore", ".a.json.abcdefgh.txt", "b.json")]
    for path in others:
        path.write_text("mine")
    clear_temporaries(tmp_path)
    assert not temporary.exists()
    assert all(path.exists() for path in (*others, tmp_path / "shards" / "rank0-0.safetensors"))
