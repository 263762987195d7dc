"""What every measurement needs: the target, a draft, and the clips, with their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alpamayo_dflash.artefacts import folder_hash

if TYPE_CHECKING:
    from alpamayo_dflash.clips import ClipSource
    from alpamayo_dflash.target import Alpamayo


def open_target(
    name: str, *, device: str, dtype: str | None = None, local_files_only: bool = False
) -> tuple[Alpamayo, str]:
    """Load the target; returns it and its folder's hash.

    Raises:
        ValueError: the checkpoint is missing or broken; the message names the file.
    """
    from alpamayo_dflash.target import Alpamayo
    from alpamayo_dflash.target.load import checkpoint_folder

    folder = checkpoint_folder(name, local_files_only=local_files_only)
    target = Alpamayo.from_pretrained(folder, dtype=dtype, device=device, local_files_only=local_files_only)
    return target, folder_hash(folder)


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
    from alpamayo_dflash.clips import parse_chunks, read_clip_list

    if clip_id is not None:
        named = [clip_id]
    elif clip_ids is not None:
        named = list(dict.fromkeys(read_clip_list(clip_ids)))
    else:
        return take(source.clip_ids(None if chunks is None else parse_chunks(chunks)), count)
    for each in named:
        source.chunk_of(each)  # refuses a clip that is not there, before anything runs
    return take(named, count)
