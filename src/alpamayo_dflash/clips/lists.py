"""Lists of chunks, of cameras and of clips, as users write them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alpamayo_dflash.clips.layout import check_clip_id
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.clips.window import check_cameras
from alpamayo_dflash.common.json_text import read_json_value
from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.common.tables import read_columns

_MOST_DIGITS = 6  # of a chunk; the dataset has thousands


def parse_chunks(text: str | None) -> list[int] | None:
    """Read chunk numbers such as `0-3,7`; ranges include both ends. None, all chunks, stays None.

    Returns:
        The numbers, each once, ascending.

    Raises:
        ValueError: the text is empty or is not of this form.
    """
    if text is None:
        return None
    chunks: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"{text!r} is no list of chunks; write numbers and ranges such as 0-3,7")
        if max(len(match[1]), len(match[2] or "")) > _MOST_DIGITS:
            raise ValueError(f"{text!r:.200}: chunks have numbers of at most {_MOST_DIGITS} digits")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{text!r}: the range of chunks {part.strip()} ends before it begins")
        chunks.update(range(first, last + 1))
    return sorted(chunks)


def parse_cameras(text: str) -> tuple[int, ...]:
    """Read dataset indices of cameras such as `0,1,2,6`, in any order; there are no ranges.

    Returns:
        The indices, ascending.

    Raises:
        ValueError: the text is empty or not of this form, or a camera is unknown or stands there twice.
    """
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*\d+\s*", part) for part in parts):
        raise ValueError(f"{text!r} is no list of cameras; write single numbers such as 0,1,2,6")
    return check_cameras([int(part) for part in parts])


def read_clip_list(path: Path | str) -> list[str]:
    """Read clip ids from a file, in its order.

    `.json` holds a list of ids, or an object with such a list under `clip_ids`; `.parquet` holds a column or
    an index named `clip_id`; any other file holds one id a line.

    Raises:
        ValueError: the file is missing, is not of its form, holds no clip, or holds one twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it should hold clip ids")
    readers = {".json": _from_json, ".parquet": _from_parquet}
    clip_ids = readers.get(path.suffix.lower(), _from_text)(path)
    if not clip_ids:
        raise ValueError(f"{path}: the list holds no clip ids")
    for clip_id in clip_ids:
        check_clip_id(clip_id, str(path))
    twice = [clip_id for clip_id, count in Counter(clip_ids).items() if count > 1]
    if twice:
        raise ValueError(
            f"{path}: {len(twice)} clip ids stand in the list more than once, such as {twice[0]}"
        )
    return clip_ids


def _from_text(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file of clip ids ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def _from_json(path: Path) -> list[str]:
    value = read_json_value(path)
    if isinstance(value, dict):
        value = value.get("clip_ids")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{path}: should be a list of clip ids, or an object with one under `clip_ids`")
    return value


def _from_parquet(path: Path) -> list[str]:
    found: list[str] = read_columns(path, {"clip_id": str}, str(path))["clip_id"].to_pylist()
    return found


def take(clip_ids: Sequence[str], count: int | None) -> list[str]:
    """A fixed choice of clips: in the order of their ids' hashes, so that it depends on nothing else.

    Args:
        clip_ids: what to choose from, in any order.
        count: how many; None takes all.

    Raises:
        ValueError: there are not so many.
    """
    if count is not None and count > len(clip_ids):
        raise ValueError(f"num_samples is {count}, but there are {len(clip_ids)} clips")
    ordered = sorted(clip_ids, key=lambda clip_id: hashlib.sha256(clip_id.encode()).digest())
    return ordered[:count]


def chosen_clips(
    source: ClipSource,
    *,
    clip_id: str | None = None,
    clip_ids: Path | None = None,
    chunks: str | None = None,
    count: int | None = None,
) -> list[str]:
    """The clips to measure on: one, a file's, some chunks', or all.

    Raises:
        ValueError: a clip is not in the dataset, there are none, or fewer than `count`.
    """
    if clip_id is not None:
        named = [check_clip_id(clip_id, "clip_id")]
    elif clip_ids is not None:
        named = list(dict.fromkeys(read_clip_list(clip_ids)))
    else:
        return take(source.clip_ids(parse_chunks(chunks)), count)
    for each in named:
        source.chunk_of(each)  # refuses a clip that is not there, before anything runs
    return take(named, count)


def sample_clips(
    clip_ids: Sequence[str], per_rank: int, *, seed: int, rank: int, world_size: int
) -> list[str]:
    """Draw this rank's clips.

    All ranks draw the same `per_rank * world_size` clips (all, if there are fewer) and take every
    `world_size`-th, so one process asked for as many clips as all ranks together scores the same ones.

    Args:
        clip_ids: the clips to draw from, in an order that is the same on every rank.
        per_rank: clips a rank.
        seed: of the draw.
        rank: of this process.
        world_size: number of processes.

    Returns:
        Clip ids in the order drawn; no clip twice, none on two ranks.
    """
    order = np.random.default_rng(generator_seed(seed)).permutation(len(clip_ids))[: per_rank * world_size]
    return [clip_ids[index] for index in order[rank::world_size]]
