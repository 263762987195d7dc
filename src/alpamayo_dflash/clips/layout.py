"""The dataset's own tables, checked before the devkit reads them: it takes them as they are."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from alpamayo_dflash.clips.cache import EGOMOTION
from alpamayo_dflash.clips.members import is_member_name
from alpamayo_dflash.clips.window import CAMERAS
from alpamayo_dflash.common.fields import checked, shown
from alpamayo_dflash.common.json_text import parse_json
from alpamayo_dflash.common.tables import read_columns

FEATURES, CLIP_INDEX = "features.csv", "clip_index.parquet"
_OTHERS = (
    "metadata/feature_presence.parquet",
    "metadata/sensor_presence.parquet",
    "metadata/data_collection.parquet",
    "splits/default.parquet",
)
_COLUMNS = ("feature", "directory", "chunk_path", "clip_files_in_zip")
_READ = {EGOMOTION, *CAMERAS.values()}  # the features whose files are read here
_EMPTY = {"na", "n/a", "nan", "null", "none"}  # words that pandas takes for an empty place
_MOST_BYTES = 2**22  # of features.csv; it has some thirty lines
_LONGEST_ID = 128
# A replacement field may ask for attributes or for gigabytes of padding; these are what the dataset has.
_CHUNK = re.compile(r"\{chunk_id(:0?[1-9]d?)?\}")
_CLIP = re.compile(r"\{clip_id\}")


def is_clip_id(text: str) -> bool:
    """Whether a text can be a clip's id: printable, no path, no replacement field, at most 128 bytes."""
    plain = text.isprintable() and not set(text) & set("/\\{}") and text.strip() == text
    return plain and text not in ("", ".", "..") and len(text.encode("utf-8")) <= _LONGEST_ID


def check_clip_id(text: str, where: str) -> str:
    """A clip's id.

    Raises:
        ValueError: it cannot be one; `where` names it.
    """
    if not is_clip_id(checked(text, str, where)):
        raise ValueError(
            f"{where}: {shown(text)} is no clip id; it must be printable, of at most {_LONGEST_ID} bytes, "
            "without slashes, braces or blanks around it"
        )
    return text


def check_tables(snapshot: Path) -> None:
    """Check the tables of a cached revision, as far as they are there.

    Raises:
        ValueError: one is none, lacks a column, or names files in a way that no dataset does; the message
            names file and key.
    """
    if (snapshot / FEATURES).is_file():
        _check_features(snapshot / FEATURES)
    path = snapshot / CLIP_INDEX
    if path.is_file():
        table = read_columns(path, {"clip_id": str, "chunk": int}, str(path))
        clip_ids = table["clip_id"].to_pylist()
        for clip_id in clip_ids:
            if not is_clip_id(clip_id):  # the name of the place is made only where it is wanted
                check_clip_id(clip_id, f"{path}: clip_id")
        if len(set(clip_ids)) < len(clip_ids):
            raise ValueError(f"{path}: a clip_id stands there twice")
        chunks = table["chunk"].to_pylist()
        outside = [chunk for chunk in chunks if not 0 <= chunk < 10**6]
        if outside:
            raise ValueError(f"{path}: chunk is {outside[0]}; it must be 0 to 999999")
    for name in _OTHERS:
        if (snapshot / name).is_file():
            read_columns(snapshot / name, {}, str(snapshot / name))


def _check_features(path: Path) -> None:
    """Check the table of features: how chunks' files, and clips' files in them, are called."""
    data = path.read_bytes()
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path}: {len(data)} bytes; a table of features has at most {_MOST_BYTES}")
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV table ({error})") from None
    for row in rows:
        lacking = [column for column in _COLUMNS if not isinstance(row.get(column), str)]
        if lacking or None in row:
            raise ValueError(
                f"{path}: a row of other columns than its head; it must have {', '.join(_COLUMNS)}"
            )
        where = f"{path}: {row['feature']!r:.100}"
        for column in ("feature", "directory"):
            if not is_member_name(row[column]) or row[column].lower() in _EMPTY:
                raise ValueError(f"{where}: {column} is {shown(row[column])}; it must be a word")
        found: Any = {}
        if row["clip_files_in_zip"]:
            found = parse_json(row["clip_files_in_zip"], f"{where}: clip_files_in_zip")
        if row["feature"] in _READ:
            _check_template(row["chunk_path"], _CHUNK, f"{where}: chunk_path")
            for alias, name in checked(found, dict[str, str], f"{where}: clip_files_in_zip").items():
                _check_template(name, _CLIP, f"{where}: clip_files_in_zip: {alias:.100}")
    names = [row["feature"] for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: a feature stands there twice")


def _check_template(text: str, field: re.Pattern[str], where: str) -> None:
    """A file's name with one kind of replacement field."""
    plain, count = field.subn("0", text)
    if not count or not is_member_name(plain) or set(plain) & set("{}"):
        raise ValueError(
            f"{where} is {shown(text)}; it must be a relative path with the one field "
            f"{'{clip_id}' if field is _CLIP else '{chunk_id}'}"
        )
