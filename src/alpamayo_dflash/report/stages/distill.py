"""`distill`: each rank's manifest, failures and table of samples, and when its shards were written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import checked, naming
from alpamayo_dflash.common.options import check_at_least, check_range
from alpamayo_dflash.common.tables import read_columns
from alpamayo_dflash.report.files import Files, listed, modified
from alpamayo_dflash.report.stages.reading import (
    MOST_MARKS,
    MOST_RANKS,
    Failure,
    Mark,
    Named,
    Reading,
    last,
    named,
)


class _Shard(TypedDict):
    file: str | None
    clips: list[str]
    failures: list[Failure]
    samples: int
    tokens: int
    bytes: int


class _Settings(TypedDict):
    world_size: int


class _Manifest(TypedDict):
    settings: _Settings
    shards: list[_Shard]
    complete: bool
    num_clips: NotRequired[int]


class _Failures(TypedDict):
    attempted: int
    failed: int
    failures: list[Failure]


@dataclass(frozen=True)
class _Part:
    """What is kept of a rank's manifest; a written shard is a moment and the clips that it took."""

    world_size: int
    num_clips: int | None
    complete: bool
    attempted: int
    counts: Mapping[str, int]
    written: tuple[Mark, ...]


def _read_part(path: Path) -> _Part:
    content = checked(read_json(path), _Manifest, str(path))
    shards = content["shards"]
    with naming(str(path)):
        check_range(1, MOST_RANKS, world_size=content["settings"]["world_size"])
        check_at_least(0, num_clips=content.get("num_clips"))
    times = [
        (at, len(shard["clips"]) + len(shard["failures"]))
        for shard in shards[-MOST_MARKS - 1 :]
        if shard["file"] is not None and (at := modified(path.parent / "shards" / shard["file"]))
    ]
    done = {clip_id for shard in shards for clip_id in shard["clips"]}
    failed = {failure["clip_id"] for shard in shards for failure in shard["failures"]} - done
    return _Part(
        world_size=content["settings"]["world_size"],
        num_clips=content.get("num_clips"),
        complete=content["complete"],
        attempted=len(done) + len(failed),
        counts={
            "responses": sum(shard["samples"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "bytes": sum(shard["bytes"] for shard in shards),
        },
        written=tuple(times),
    )


def _read_failures(path: Path) -> tuple[int, list[Named]]:
    content = checked(read_json(path), _Failures, str(path))
    return content["failed"], named(content["failures"])


def _last_texts(path: Path, count: int) -> tuple[Named, ...]:
    """The last greedy CoCs of a table of samples."""
    table = read_columns(path, {"clip_id": str, "sample": int, "text": str}, str(path))
    rows = table.to_pylist()
    return last([(row["clip_id"], row["text"]) for row in rows if row["sample"] == 0], count)


class DistillReader:
    """`distill`: a rank's manifest lists its finished shards, whose files say when they were written."""

    def __init__(self, folder: Path, files: Files, texts: int) -> None:
        self.folder, self.files, self.kept = folder, files, texts

    def __call__(self, since: float) -> Reading | None:
        """See StageReader."""
        paths = listed(self.folder, "manifest-rank*.json")
        parts = [part for path in paths if (part := self.files.read(path, _read_part))]
        if not parts:
            return None
        failed = [
            found
            for path in listed(self.folder, "failures-rank*.json")
            if (found := self.files.read(path, _read_failures))
        ]
        size, totals = parts[0].world_size, [part.num_clips for part in parts]
        known = [total for total in totals if total is not None]
        ready = sum(part.complete for part in parts)
        notes = []
        if len(known) < len(totals):
            notes.append("the manifests are of an older version and do not say how many clips there are")
        if size > 1:
            notes.append(f"ranks: {len(parts)} of {size} have begun, {ready} are done")
        names = ("responses", "tokens", "bytes")
        return Reading(
            "distill",
            "clips",
            sum(part.attempted for part in parts),
            sum(known) if len(known) == len(totals) else None,
            finished=ready == size,
            marks=_marks([mark for part in parts for mark in part.written], since),
            failed=sum(count for count, _ in failed),
            failures=last([failure for _, found in failed for failure in found], self.kept),
            texts=self._texts(),
            figures={name: sum(part.counts[name] for part in parts) for name in names},
            notes=tuple(notes),
        )

    def _texts(self) -> tuple[Named, ...]:
        """Of the rank that wrote last."""
        paths = listed(self.folder, "samples-rank*.parquet")
        if not paths:
            return ()
        newest = max(paths, key=lambda path: modified(path) or 0)
        return self.files.read(newest, partial(_last_texts, count=self.kept)) or ()


def _marks(written: Iterable[Mark], since: float) -> tuple[Mark, ...]:
    """How much was done when, by all ranks, from what each of them added when; with the run's beginning."""
    added = sorted((at, count) for at, count in written if at >= since)
    if not since or not added:
        return ()
    found, done = [(since, 0.0)], 0.0
    for at, count in added:
        done += count
        found.append((at, done))
    return tuple(found if len(added) == 1 else found[1:])[-MOST_MARKS:]
