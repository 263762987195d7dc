"""Writing one rank's part of a distillation set, shard by shard, so that it can be taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from alpamayo_dflash.clips.source import failure_kinds
from alpamayo_dflash.common.artefacts import write_record
from alpamayo_dflash.common.ranks import require_same
from alpamayo_dflash.distill.shards import (
    FORMAT,
    DistillSample,
    manifest_path,
    open_failures,
    read_manifest,
    read_manifests,
    read_table,
    record,
    remove_leftovers,
    require_shard,
    rows_hash,
    shard_name,
    shard_path,
    table_path,
    write_merged,
    write_shard,
    write_table,
)


@dataclass(frozen=True)
class Response:
    """One response of the target, with what is kept of it.

    Attributes:
        token_ids: T ids as the target emitted them.
        text: their CoC.
        stop: why it ended.
        temperature: it was sampled at; 0 is greedy.
        top_p: nucleus it was sampled with.
        seed: of its noise.
        tensors: see `DistillData.tensors`.
    """

    token_ids: tuple[int, ...]
    text: str
    stop: str
    temperature: float
    top_p: float
    seed: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class ClipResult:
    """What came of one clip: responses, or the reason why there are none, and its kind."""

    clip_id: str
    chunk: int
    responses: tuple[Response, ...] = ()
    failure: str | None = None
    kind: str = "target"
    files: Mapping[str, Any] = field(default_factory=dict)  # of one that failed, see `ClipSource.files`


class RankWriter:
    """One rank's shards, table and manifest.

    Shard n holds the responses of the n-th run of `clips_per_shard` clips, whatever happened before; that is
    why a set that was interrupted and taken up again equals one that was not.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        settings: Mapping[str, Any],
        clip_ids: Sequence[str],
        *,
        clips_per_shard: int,
        provenance: Mapping[str, Any],
        again: Callable[[Mapping[str, Any]], bool] = lambda _: False,
    ) -> None:
        """Look at what is there of a rank's part; nothing is written yet.

        Args:
            folder: the output folder.
            rank: of this process.
            settings: all that decides the content, equal on every rank and on every run in this folder.
            clip_ids: this rank's clips, in the order to be written.
            clips_per_shard: clips whose responses make a shard.
            provenance: the record of this run.
            again: whether a clip that failed, by the manifest's entry of it, is to be tried again; its
                responses then go into a shard of their own, behind all others.

        Raises:
            ValueError: the folder holds data made with other settings, or has lost finished files; the
                message names the file, and the setting.
        """
        self.folder, self.rank = folder, rank
        self._groups = [
            list(clip_ids[start : start + clips_per_shard])
            for start in range(0, len(clip_ids), clips_per_shard)
        ]
        self._started = time.time()
        for other in read_manifests(folder):
            require_same(other["settings"], settings, manifest_path(folder, other["rank"]))
        self._manifest: dict[str, Any] = {"format": FORMAT, "rank": rank, "settings": settings}
        self._manifest |= {"num_clips": len(clip_ids), "shards": []}
        self._begun = manifest_path(folder, rank).exists()
        if self._begun:
            self._manifest["shards"] = read_manifest(manifest_path(folder, rank))["shards"]
        shards = self._manifest["shards"]
        self._groups += [_clips_of(shard) for shard in shards[len(self._groups) :]]
        retried = [failure["clip_id"] for failure in open_failures(shards) if again(failure)]
        self._groups += [
            retried[start : start + clips_per_shard] for start in range(0, len(retried), clips_per_shard)
        ]
        self._samples = read_table(table_path(folder, rank), self._manifest["shards"])
        self._require_shards()
        self._manifest["provenance"] = dict(provenance)

    def begin(self) -> None:
        """Clear away what a killed run left half-written, and claim the folder for these settings."""
        remove_leftovers(self.folder, self.rank)
        self._begun = True
        self._write_manifest()

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides the content."""
        settings: Mapping[str, Any] = self._manifest["settings"]
        return settings

    @property
    def complete(self) -> bool:
        """Whether this part was begun and every shard is finished; a rank without clips has none."""
        return self._begun and len(self._manifest["shards"]) == len(self._groups)

    @property
    def remaining(self) -> list[list[str]]:
        """The clips of each shard that is still to be written, in order."""
        return self._groups[len(self._manifest["shards"]) :]

    def write(self, results: Sequence[ClipResult]) -> None:
        """Finish the next shard: first its tensors, then the table, then the manifest that vouches for both.

        Args:
            results: one for each clip of the first entry of `remaining`, in its order.
        """
        assert [result.clip_id for result in results] == self.remaining[0]
        name = shard_name(self.rank, len(self._manifest["shards"]))
        pairs = [
            (result, number, response)
            for result in results
            for number, response in enumerate(result.responses)
        ]
        written: dict[str, Any] = {"bytes": 0, "sha256": None}
        if pairs:
            written = write_shard(
                shard_path(self.folder, name), [response.tensors for _, _, response in pairs]
            )
        rows = [self._row(result, number, name, index) for index, (result, number, _) in enumerate(pairs)]
        self._samples += rows
        write_table(table_path(self.folder, self.rank), self._samples)
        self._manifest["shards"].append(
            {
                "file": name if pairs else None,
                "clips": [result.clip_id for result in results if result.failure is None],
                "failures": [
                    {
                        "clip_id": result.clip_id,
                        "reason": result.failure,
                        "kind": result.kind,
                        "files": dict(result.files),
                    }
                    for result in results
                    if result.failure is not None
                ],
                "samples": len(pairs),
                "tokens": sum(len(response.token_ids) for _, _, response in pairs),
                **written,
                "rows": rows_hash(rows),
            }
        )
        self._write_manifest()

    def summary(self) -> dict[str, Any]:
        """Clips attempted, done and failed by this rank so far, and its responses, tokens and bytes."""
        shards = self._manifest["shards"]
        failures = open_failures(shards)
        done, failed = sum(len(shard["clips"]) for shard in shards), len(failures)
        counts = {key: sum(shard[key] for shard in shards) for key in ("samples", "tokens", "bytes")}
        return {
            "clips": {"attempted": done + failed, "done": done, "failed": failed},
            "failure_kinds": failure_kinds(failures),
            **counts,
        }

    def _write_manifest(self) -> None:
        """Write the rank's manifest and failures, and merge the ranks' manifests into `distill.json`."""
        self._manifest["complete"] = self.complete
        self._manifest["token_counts"] = record(self._samples)
        self._manifest["provenance"]["wall_s"] = round(time.time() - self._started, 3)
        failures = open_failures(self._manifest["shards"])
        write_record(
            self.folder / f"failures-rank{self.rank}.json", {**self.summary()["clips"], "failures": failures}
        )
        write_record(manifest_path(self.folder, self.rank), self._manifest)
        write_merged(self.folder)

    def _require_shards(self) -> None:
        """Refuse to go on from finished shards that are gone or were cut short."""
        for shard in self._manifest["shards"]:
            if shard["file"] is None:
                continue
            require_shard(shard_path(self.folder, shard["file"]), shard)

    def _row(self, result: ClipResult, number: int, shard: str, index: int) -> DistillSample:
        """The table's row of a clip's response `number`, which is `index` in its shard."""
        response = result.responses[number]
        return DistillSample(
            clip_id=result.clip_id,
            chunk=result.chunk,
            t0_us=self.settings["t0_us"],
            sample=number,
            temperature=response.temperature,
            top_p=response.top_p,
            seed=response.seed,
            token_ids=response.token_ids,
            text=response.text,
            stop=response.stop,
            shard=shard,
            index=index,
        )


def _clips_of(shard: Mapping[str, Any]) -> list[str]:
    return [*shard["clips"], *(failure["clip_id"] for failure in shard["failures"])]
