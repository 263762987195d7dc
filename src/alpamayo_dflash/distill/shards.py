"""The files of a distillation set: shards, the table of samples, each rank's manifest, and their union.

A shard holds the responses of a fixed run of a rank's clips and is written whole; the rank's manifest lists
the finished ones. Whatever was cut short is therefore redone in the same shape, and an interrupted set equals
an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import re
import typing
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from alpamayo_dflash.common.artefacts import atomic_file, file_hash, read_json, write_record
from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.common.fields import checked, naming, shown, value_of
from alpamayo_dflash.common.options import check_at_least
from alpamayo_dflash.common.ranks import require_same
from alpamayo_dflash.common.records import digest
from alpamayo_dflash.common.tables import read_columns
from alpamayo_dflash.common.tensors import TensorFile, header_hash, save_tensors
from alpamayo_dflash.distill.config import DEFAULT_HELD_OUT
from alpamayo_dflash.distill.manifest import check_manifest

with needs("train"):
    import pyarrow
    import pyarrow.parquet

_KINDS: dict[Any, Any] = {int: int, float: float, str: str, tuple[int, ...]: list}
_MOST_ROWS = 2**26

FORMAT = 1
MANIFEST_FILE = "distill.json"
TENSOR_NAMES = ("prompt_states", "states", "topk_logits", "topk_ids")


@dataclass(frozen=True)
class DistillSample:
    """One response: a row of the table of samples.

    Attributes:
        clip_id: the clip it was written on.
        chunk: the clip's chunk.
        t0_us: the moment, microseconds on the clip's clock.
        sample: its number among the clip's responses; 0 is greedy.
        temperature: it was sampled at; 0 for the greedy one.
        top_p: nucleus it was sampled with.
        seed: with the window and the sample's number it fixes the noise: sample n > 0 is sample n - 1 of
            `generate` with this seed, temperature and nucleus.
        token_ids: the ids that the target emitted, never text tokenised again.
        text: their CoC, for reading.
        stop: why the response ended, in the decoder's words.
        shard: file name of the shard with its tensors.
        index: its number in that shard.
    """

    clip_id: str
    chunk: int
    t0_us: int
    sample: int
    temperature: float
    top_p: float
    seed: int
    token_ids: tuple[int, ...]
    text: str
    stop: str
    shard: str
    index: int


def shard_name(rank: int, number: int) -> str:
    """File name of a rank's shard."""
    return f"rank{rank}-{number}.safetensors"


def shard_path(folder: Path, name: str) -> Path:
    """Where a shard lies."""
    return folder / "shards" / name


def table_path(folder: Path, rank: int) -> Path:
    """Where a rank's table of samples lies."""
    return folder / f"samples-rank{rank}.parquet"


def manifest_path(folder: Path, rank: int) -> Path:
    """Where a rank's manifest lies."""
    return folder / f"manifest-rank{rank}.json"


def write_shard(path: Path, responses: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Write the tensors of a shard's responses, atomically.

    Args:
        path: the safetensors file.
        responses: for each index the tensors of `TENSOR_NAMES`.

    Returns:
        `bytes` and `sha256` of the file, and `header`, the hash that vouches for its tensors' checksums.
    """
    with atomic_file(path) as temporary:
        save_tensors(
            {
                f"{index}.{name}": tensors[name]
                for index, tensors in enumerate(responses)
                for name in TENSOR_NAMES
            },
            temporary,
        )
    return {"bytes": path.stat().st_size, "sha256": file_hash(path), "header": header_hash(path)}


def open_shard(folder: Path, shard: Mapping[str, Any]) -> TensorFile:
    """Open a shard, whose tensors are tested as they are read.

    Args:
        folder: the set's.
        shard: its entry in a manifest; one made before there were checksums is tested whole, here.

    Raises:
        ValueError: the shard is missing, cut short, corrupt or not the one of the manifest.
    """
    path = shard_path(folder, shard["file"])
    require_shard(path, shard)
    if "header" not in shard and file_hash(path) != shard["sha256"]:
        raise ValueError(f"{path}: corrupt shard, its content is not what was written")
    return TensorFile(path)


def require_shard(path: Path, shard: Mapping[str, Any]) -> None:
    """Raise ValueError unless a shard is there, as long as it was, and the one that its manifest lists."""
    found = path.stat().st_size if path.exists() else None
    if found != shard["bytes"]:
        state = "missing shard" if found is None else f"corrupt shard, {found} bytes long"
        raise ValueError(f"{path}: {state}, but finished with {shard['bytes']} bytes; restore it")
    if "header" in shard and header_hash(path) != shard["header"]:
        raise ValueError(f"{path}: corrupt shard, or one of another run, not the manifest's; restore it")


def rows_hash(samples: Sequence[DistillSample]) -> str:
    """The hash that a manifest keeps of a shard's rows in the table of samples."""
    # As Parquet gives them back: of a temperature of 0 it makes 0.0.
    numbers = ("temperature", "top_p")
    return digest(
        [asdict(sample) | {name: float(getattr(sample, name)) for name in numbers} for sample in samples]
    )


def write_table(path: Path, samples: Sequence[DistillSample]) -> None:
    """Write a rank's table of samples as Parquet, atomically."""
    # A seed may be any whole number; those that Parquet's integers do not hold are kept as text.
    long = any(not -(2**63) <= sample.seed < 2**63 for sample in samples)
    schema = pyarrow.schema(
        [
            ("clip_id", pyarrow.string()),
            ("chunk", pyarrow.int32()),
            ("t0_us", pyarrow.int64()),
            ("sample", pyarrow.int32()),
            ("temperature", pyarrow.float64()),
            ("top_p", pyarrow.float64()),
            ("seed", pyarrow.string() if long else pyarrow.int64()),
            ("token_ids", pyarrow.list_(pyarrow.int32())),
            ("text", pyarrow.string()),
            ("stop", pyarrow.string()),
            ("shard", pyarrow.string()),
            ("index", pyarrow.int32()),
        ]
    )
    rows = [asdict(sample) | ({"seed": str(sample.seed)} if long else {}) for sample in samples]
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    with atomic_file(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def read_table(
    path: Path, shards: Sequence[Mapping[str, Any]], bad: dict[str, str] | None = None
) -> list[DistillSample]:
    """Read the rows of a rank's finished shards.

    Args:
        path: the Parquet file.
        shards: the finished shards of the rank's manifest; rows of others (a write cut short) are left out.
        bad: gets what is wrong with a shard's rows, by its file, in place of an error; those are left out.

    Raises:
        ValueError: the file is missing or broken, or the rows of a finished shard are not what was written;
            the message names it.
    """
    expected = {shard["file"]: shard["samples"] for shard in shards if shard["file"] is not None}
    if not expected:
        return []
    by_shard: dict[str, list[DistillSample]] = {name: [] for name in expected}
    try:
        for sample in read_samples(path, expected):
            by_shard[sample.shard].append(sample)
    except ValueError as error:
        if bad is None:
            raise
        bad.update(dict.fromkeys(expected, str(error)))
        return []
    for shard in shards:
        try:
            if shard["file"] is not None:
                _check_rows(by_shard[shard["file"]], shard, path)
        except ValueError as error:
            if bad is None:
                raise
            bad[shard["file"]] = str(error)
    return [sample for name, rows in by_shard.items() if not bad or name not in bad for sample in rows]


def _check_rows(rows: Sequence[DistillSample], shard: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless these are a shard's rows; those made before hashes were kept are counted."""
    name = shard["file"]
    if len(rows) != shard["samples"]:
        raise ValueError(
            f"{path}: {len(rows)} rows for shard {name}, which holds {shard['samples']} responses"
        )
    if "rows" in shard and rows_hash(rows) != shard["rows"]:
        raise ValueError(f"{path}: corrupt, the rows for shard {name} are not what was written")


def read_samples(path: Path, shards: Container[str]) -> list[DistillSample]:
    """The rows of a table of samples that are of these shards.

    Raises:
        ValueError: the file is missing or broken, or lacks a column or a value; the message names it.
    """
    kinds = {name: _KINDS.get(hint, object) for name, hint in typing.get_type_hints(DistillSample).items()}
    samples = []
    for row in read_columns(path, kinds | {"seed": object}, str(path), most_rows=_MOST_ROWS).to_pylist():
        if row["shard"] in shards:
            with naming(f"{path}: shard {row['shard']}, index {row['index']}"):
                seed, ids = whole_seed(row["seed"]), tuple(checked(row["token_ids"], list[int], "token_ids"))
                if any(number < 0 for number in (row["index"], *ids)):
                    raise ValueError("index and token_ids must not be negative")
                check_at_least(0, temperature=row["temperature"], top_p=row["top_p"])
                samples.append(DistillSample(**{**row, "seed": seed, "token_ids": ids}))
    return samples


def whole_seed(value: Any) -> int:
    """A seed of the table: a whole number, or one written as text.

    Raises:
        ValueError: it is neither.
    """
    if type(value) is int or (isinstance(value, str) and re.fullmatch(r"-?\d{1,4000}", value)):
        return int(value)
    raise ValueError(f"seed is {shown(value)}; it must be a whole number")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a rank's manifest.

    Raises:
        ValueError: missing, broken or of another format; the message names the file.
    """
    content = read_json(path)
    if value_of(content, "format", int, where=str(path)) > FORMAT:
        raise ValueError(
            f"{path}: of format {content['format']}, written by a newer version; this one reads {FORMAT}"
        )
    if content["format"] != FORMAT:
        raise ValueError(f"{path}: not a manifest of distillation data of format {FORMAT}")
    check_manifest(content, path)
    return content


def read_manifests(folder: Path) -> list[dict[str, Any]]:
    """Read the manifests of all ranks that have begun, by rank.

    Raises:
        ValueError: they do not belong together; the message names the file and the setting.
    """
    found = [(path, read_manifest(path)) for path in folder.glob("manifest-rank*.json")]
    found.sort(key=lambda item: item[1]["rank"])
    for path, content in found[1:]:
        require_same(content["settings"], found[0][1]["settings"], path)
    return [content for _, content in found]


def merge(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the ranks' manifests together: the content of `distill.json`.

    Args:
        manifests: at least one, with equal settings.

    Returns:
        what the set holds, its settings, and for each rank whether it is complete.
    """
    settings = manifests[0]["settings"]
    begun = {content["rank"]: content for content in manifests}
    world = range(settings["world_size"])
    complete = {str(rank): rank in begun and begun[rank]["complete"] for rank in world}
    shards = [shard for content in manifests for shard in content["shards"]]
    failures = open_failures(shards)
    done = sum(len(shard["clips"]) for shard in shards)
    counts = merged_record(manifests)
    return {
        "format": FORMAT,
        "taps": settings["taps"],
        "context_len": settings["context_len"],
        "top_k": settings["top_k"],
        "full_vocab": settings["full_vocab"],
        "hidden_size": settings["hidden_size"],
        "vocab_size": settings["vocab_size"],
        "num_target_layers": settings["num_target_layers"],
        "dtype": settings["dtype"],
        "samples": sum(shard["samples"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "clips": {"attempted": done + len(failures), "done": done, "failed": len(failures)},
        "complete": complete,
        **({} if counts is None else {"token_counts": counts}),
        "settings": settings,
        "shards": shards,
        "provenance": {str(content["rank"]): content["provenance"] for content in manifests},
    }


def open_failures(shards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The clips that failed and have not been done since, each by its last failure."""
    done = {clip_id for shard in shards for clip_id in shard["clips"]}
    last = {failure["clip_id"]: failure for shard in shards for failure in shard["failures"]}
    return [failure for clip_id, failure in last.items() if clip_id not in done]


def write_merged(folder: Path) -> dict[str, Any]:
    """Bring `distill.json` up to date with the manifests of all ranks, beside other ranks doing the same.

    A rank looks again after its own write, until the file agrees with the manifests; so whoever writes last
    has seen every manifest.
    """
    path = folder / MANIFEST_FILE
    while True:
        merged = merge(read_manifests(folder))
        if path.exists() and read_json(path) == merged:
            return merged
        write_record(path, merged)


def remove_leftovers(folder: Path, rank: int) -> None:
    """Remove the temporary files that a killed process of this rank left behind."""
    patterns = (
        f"shards/.rank{rank}-*",
        f".samples-rank{rank}.*",
        f".manifest-rank{rank}.*",
        f".failures-rank{rank}.*",
    )
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def is_held_out(clip_id: str, share: float) -> bool:
    """Whether a clip is held out: by a hash of its id, so always the same way, whatever else there is."""
    return clip_number(clip_id) < share * 2**64


def clip_number(clip_id: str) -> int:
    """A number below 2⁶⁴ that a clip's id hashes to."""
    return int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8], "big")


def count_tokens(samples: Sequence[DistillSample]) -> dict[int, int]:
    """How often each token id stands in these responses, ids ascending."""
    counts = Counter(token for sample in samples for token in sample.token_ids)
    return dict(sorted(counts.items()))


def record(samples: Sequence[DistillSample]) -> dict[str, Any]:
    """What a manifest holds: the counts of the responses that the default split trains on, and its share."""
    train = [sample for sample in samples if not is_held_out(sample.clip_id, DEFAULT_HELD_OUT)]
    counts = {str(token): count for token, count in count_tokens(train).items()}
    return {"held_out": DEFAULT_HELD_OUT, "counts": counts}


def merged_record(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The ranks' records added up; None where one has none (an older set), or of another share."""
    records = [manifest.get("token_counts") for manifest in manifests]
    if any(found is None or found["held_out"] != DEFAULT_HELD_OUT for found in records):
        return None
    total: Counter[str] = Counter()
    for found in records:
        total.update(found["counts"])  # type: ignore[index]
    counts = dict(sorted(total.items(), key=lambda item: int(item[0])))
    return {"held_out": DEFAULT_HELD_OUT, "counts": counts}


def training_counts(
    manifest: Mapping[str, Any], train: Sequence[DistillSample], *, held_out: float | None
) -> dict[int, int]:
    """Token counts of a training split: the recorded ones where they are of this split, else counted now.

    Args:
        manifest: of the set.
        train: the split's responses.
        held_out: share of clips that it holds out by hash; None where it holds out otherwise.
    """
    found = manifest.get("token_counts")
    if found is None or found["held_out"] != held_out:
        return count_tokens(train)
    return {int(token): count for token, count in found["counts"].items()}
