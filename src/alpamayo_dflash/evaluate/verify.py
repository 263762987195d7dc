"""Reading every record below a folder and holding it to its checksum: the `verify` command.

Hashing 300 GB at each start would be no answer, so the stages test a record as they read it, and this reads
all of them when it is asked to.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from alpamayo_dflash.common.json_text import read_json_value
from alpamayo_dflash.common.records import unsealed
from alpamayo_dflash.common.tensors import TensorFile
from alpamayo_dflash.distill.shards import (
    open_shard,
    read_manifest,
    read_table,
    shard_path,
    table_path,
)
from alpamayo_dflash.evaluate.config import VerifyConfig
from alpamayo_dflash.evaluate.rows import read_lines

_MANIFESTS = "manifest-rank*.json"


@dataclass
class _Found:
    """What was read of one file, or of one part of a set.

    Attributes:
        sound: records that are what was written.
        not_recorded: records without a checksum; they could be read.
        faults: what is wrong with the others.
    """

    sound: int = 0
    not_recorded: int = 0
    faults: list[str] = field(default_factory=list)


def run(config: VerifyConfig) -> dict[str, Any]:
    """Read everything below the folders.

    Returns:
        by kind the counts of files, sound records, records without a checksum and faults; every fault's
        text; the number of files that no reader here is for; `passed`: no fault.

    Raises:
        ValueError: a folder is missing.
    """
    missing = [str(folder) for folder in config.folders if not folder.exists()]
    if missing:
        raise ValueError(f"{missing[0]}: no such folder")
    tasks, others = _tasks(config.folders)
    kinds: dict[str, Counter[str]] = {}
    faults: list[str] = []
    console = Console(stderr=True)
    with ThreadPoolExecutor(config.workers) as pool:
        answers = pool.map(lambda task: task[1](), tasks)
        for (kind, _), found in zip(tasks, track(answers, "verifying", len(tasks), console=console)):  # noqa: B905
            count = kinds.setdefault(kind, Counter(files=0, sound=0, not_recorded=0, faults=0))
            count.update(
                files=1, sound=found.sound, not_recorded=found.not_recorded, faults=len(found.faults)
            )
            faults += found.faults
    for fault in faults:
        console.print(fault, style="red", highlight=False, markup=False, soft_wrap=True)
    kept = {kind: dict(count) for kind, count in sorted(kinds.items())}
    return {"kinds": kept, "faults": faults, "other_files": others, "passed": not faults}


_Task = tuple[str, Callable[[], _Found]]


def _tasks(folders: tuple[Path, ...]) -> tuple[list[_Task], int]:
    """What there is to read: a kind and a reading each; and how many files nothing here reads."""
    tasks: list[_Task] = []
    others = 0
    for path in dict.fromkeys(path for folder in folders for path in _files(folder)):
        reader = _READERS.get(path.suffix)
        if reader is not None:
            kind, read = reader
            tasks.append((kind, partial(_guarded, read, path)))
        else:
            others += path.suffix != ".parquet"
        if path.match(_MANIFESTS):
            tasks += _parts_of(path)
    return tasks, others


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, hidden ones left out; a file is its own."""
    if folder.is_file():
        yield folder
        return
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _parts_of(path: Path) -> list[_Task]:
    """What a rank's manifest vouches for: the rows of its table, and that its shards are its own."""
    try:
        manifest = read_manifest(path)
        rank, shards = int(manifest["rank"]), manifest["shards"]
    except (ValueError, KeyError):
        return []  # said where the file itself is read
    written = [shard for shard in shards if shard["file"] is not None]

    def rows() -> _Found:
        bad: dict[str, str] = {}
        read_table(table_path(path.parent, rank), shards, bad)
        found = _Found(faults=list(dict.fromkeys(bad.values())))
        for shard in written:
            if shard["file"] not in bad:
                recorded = "rows" in shard
                found.sound += recorded * shard["samples"]
                found.not_recorded += (not recorded) * shard["samples"]
        return found

    def listed(shard: Mapping[str, Any]) -> Callable[[], _Found]:
        def read(_: Path) -> _Found:
            open_shard(path.parent, shard).close()
            return _Found(sound=1)

        return lambda: _guarded(read, shard_path(path.parent, shard["file"]))

    return [("tables of samples", rows), *(("listed shards", listed(shard)) for shard in written)]


def _guarded(read: Callable[[Path], _Found], path: Path) -> _Found:
    try:
        return read(path)
    except (ValueError, OSError) as error:
        text = str(error)
        return _Found(faults=[text if str(path) in text else f"{path}: {text}"])


def _read_object(path: Path) -> _Found:
    value = read_json_value(path)
    recorded = isinstance(value, dict) and unsealed(value, str(path))[1]
    return _Found(sound=int(recorded), not_recorded=int(not recorded))


def _read_rows(path: Path) -> _Found:
    recorded = [recorded for _, recorded in read_lines(path)]
    return _Found(sound=sum(recorded), not_recorded=recorded.count(False))


def _read_tensors(path: Path) -> _Found:
    file, found = TensorFile(path), _Found()
    for name in file.keys():  # noqa: SIM118
        try:
            file.get_tensor(name)
        except ValueError as error:
            found.faults.append(str(error))
    count = len(file.keys()) - len(found.faults)
    found.sound, found.not_recorded = (count, 0) if file.recorded else (0, count)
    file.close()
    return found


def _read_archive(path: Path) -> _Found:
    """A chunk of the dataset; its members carry checksums of the format's own."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            members = len(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a readable archive ({error})") from None
    if damaged is not None:
        raise ValueError(f"{path}: corrupt, {damaged} is not what was written")
    return _Found(sound=members)


_READERS: dict[str, tuple[str, Callable[[Path], _Found]]] = {
    ".json": ("objects", _read_object),
    ".jsonl": ("rows", _read_rows),
    ".safetensors": ("tensors", _read_tensors),
    ".zip": ("archives", _read_archive),
}
