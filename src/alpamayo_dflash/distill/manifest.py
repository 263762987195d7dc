"""The shape of a rank's manifest, as `read_manifest` checks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from alpamayo_dflash.common.fields import checked, file_name, naming
from alpamayo_dflash.common.options import check_at_least, check_range

MOST_RANKS = 2**16


class FailureEntry(TypedDict):
    """A clip that failed; older manifests lack the kind and the files."""

    clip_id: str
    reason: str
    kind: NotRequired[str]
    files: NotRequired[dict[str, list[int] | None]]


class ShardEntry(TypedDict):
    """A finished shard; one whose clips all failed has no file."""

    file: str | None
    clips: list[str]
    failures: list[FailureEntry]
    samples: int
    tokens: int
    bytes: int
    sha256: str | None


class TokenCounts(TypedDict):
    """The token counts of a default training split."""

    held_out: float
    counts: dict[str, int]


class Settings(TypedDict):
    """The settings that are read; others are only compared."""

    target: str
    world_size: int
    taps: list[int]
    context_len: int
    top_k: int
    full_vocab: bool
    hidden_size: int
    vocab_size: int
    num_target_layers: int
    dtype: str


class Manifest(TypedDict):
    """A rank's manifest; older ones lack the counts, and how many clips the rank is to do."""

    rank: int
    settings: Settings
    num_clips: NotRequired[int]
    shards: list[ShardEntry]
    complete: bool
    provenance: dict[str, Any]
    token_counts: NotRequired[TokenCounts | None]


def check_manifest(content: dict[str, Any], path: Path) -> None:
    """Check every value that is read of a manifest.

    Raises:
        ValueError: one is missing, of another kind or out of its range; the message names file and key.
    """
    where = str(path)
    checked(content, Manifest, where)
    settings = content["settings"]
    with naming(where):
        check_range(1, MOST_RANKS, world_size=settings["world_size"])
        check_range(0, settings["world_size"] - 1, rank=content["rank"])
        check_at_least(0, num_clips=content.get("num_clips"))
        for key in ("context_len", "top_k", "hidden_size", "vocab_size", "num_target_layers"):
            check_at_least(0, **{key: settings[key]})
        for shard in content["shards"]:
            check_at_least(0, samples=shard["samples"], tokens=shard["tokens"], bytes=shard["bytes"])
            if shard["file"] is not None:
                file_name(shard["file"], "shards: file")
    if path.name != (name := f"manifest-rank{content['rank']}.json"):
        raise ValueError(f"{where}: rank is {content['rank']}, whose manifest is {name}")
    counts = (content.get("token_counts") or {}).get("counts", {})
    strange = [token for token in counts if not (token.isdecimal() and len(token) < 19)]
    if strange:
        raise ValueError(f"{where}: token_counts.counts has a key {strange[0]!r:.100}; it must be a token id")
