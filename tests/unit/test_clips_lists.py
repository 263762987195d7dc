"""Lists of chunks and clips."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from alpamayo_dflash.clips.lists import parse_cameras, parse_chunks, read_clip_list
from alpamayo_dflash.clips.source import ClipSource, _ranges


def test_chunks_are_numbers_and_ranges():
    assert parse_chunks("0-3,7") == [0, 1, 2, 3, 7]
    assert parse_chunks(" 5 , 1-2,2 ") == [1, 2, 5]


@pytest.mark.parametrize("text", ["", "a", "1,,2", "3-1", "-4", "1-2-3"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="chunks"):
        parse_chunks(text)


def test_cameras_are_single_numbers():
    assert parse_cameras("0,1,2,6") == (0, 1, 2, 6)
    assert parse_cameras(" 6, 1") == (1, 6)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "0-2", "1,1", "7", "-1"])
def test_other_cameras_are_refused(text):
    with pytest.raises(ValueError, match="cameras"):
        parse_cameras(text)


def test_clip_lists_of_every_form(tmp_path):
    ids = ["b", "a", "c"]
    (tmp_path / "ids.txt").write_text("b\n\n a \nc\n")
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    (tmp_path / "object.json").write_text(json.dumps({"clip_ids": ids}))
    pd.DataFrame({"clip_id": ids}).to_parquet(tmp_path / "column.parquet")
    pd.DataFrame({"x": 1}, index=pd.Index(ids, name="clip_id")).to_parquet(tmp_path / "index.parquet")
    for file in tmp_path.iterdir():
        assert read_clip_list(file) == ids, file.name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n", "holds no clip ids"),
        ("empty.json", "[]", "holds no clip ids"),
        ("twice.txt", "a\nb\na\n", "more than once, such as a"),
        ("broken.json", "[", "not valid JSON"),
        ("other.json", '{"ids": []}', "should be a list"),
        ("broken.parquet", "no", "not a Parquet file"),
    ],
)
def test_bad_clip_lists_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_clip_list(tmp_path / name)


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_clip_list(tmp_path / "none.txt")


def test_a_source_needs_a_cache_and_known_cameras(tmp_path):
    with pytest.raises(ValueError, match="no cache of the dataset"):
        ClipSource(tmp_path)
    for cameras in ((), (0, 0), (0, 9)):
        with pytest.raises(ValueError, match="cameras"):
            ClipSource(tmp_path, cameras=cameras)


def test_runs_of_numbers_are_shortened():
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert _ranges([]) == "none"
