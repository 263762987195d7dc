"""Reading a distillation set: its manifest, its samples, and their tensors on demand."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.common.artefacts import file_hash
from alpamayo_dflash.common.identity import Fingerprint
from alpamayo_dflash.common.tensors import FLOATS, TensorFile
from alpamayo_dflash.distill.config import BadShardRule
from alpamayo_dflash.distill.shards import (
    MANIFEST_FILE,
    TENSOR_NAMES,
    DistillSample,
    merge,
    open_shard,
    read_manifests,
    read_table,
    require_shard,
    shard_path,
    table_path,
)

_OPEN_SHARDS = 32


class DistillData:
    """A distillation set, the ranks' parts put together.

    Attributes:
        folder: where it lies.
        manifest: taps, context_len, top_k, hidden_size, vocab_size, num_target_layers, dtype, the settings
            and the counts, as in `distill.json`; `token_counts` where the set is new enough to have them
            (`shards.training_counts` counts in any case).
        samples: one entry a response: rank by rank, in the order written.
        bad_shards: by file, what is wrong with the rows of those that were left out.
    """

    def __init__(
        self, folder: Path | str, *, allow_incomplete: bool = False, on_bad_shard: BadShardRule = "fail"
    ) -> None:
        """Read manifests and tables; tensors are read when asked for.

        Args:
            folder: the output folder of `distill`.
            allow_incomplete: take what is there although a rank has not finished or not begun.
            on_bad_shard: skip leaves out shards whose rows are not what was written.

        Raises:
            ValueError: no set, parts that do not belong together, an unfinished rank, or a broken or missing
                file; the message names it.
        """
        self.folder = Path(folder)
        manifests = read_manifests(self.folder)
        if not manifests:
            raise ValueError(f"{self.folder}: no distillation data (no manifest of any rank)")
        self.manifest: dict[str, Any] = merge(manifests)
        unfinished = [rank for rank, complete in self.manifest["complete"].items() if not complete]
        if unfinished and not allow_incomplete:
            raise ValueError(
                f"{self.folder}: not finished by rank {', '.join(unfinished)} of "
                f"{len(self.manifest['complete'])}; run distill again, it goes on where it was"
            )
        self.samples: list[DistillSample] = []
        self.bad_shards: dict[str, str] = {}
        bad = self.bad_shards if on_bad_shard == "skip" else None
        for content in manifests:
            self.samples += read_table(table_path(self.folder, content["rank"]), content["shards"], bad)
        self._files: OrderedDict[str, TensorFile] = OrderedDict()
        self._shards = {shard["file"]: shard for shard in self.manifest["shards"] if shard["file"]}

    @property
    def identity(self) -> Fingerprint:
        """What the set holds: its settings, its responses and their tensors, whenever and by whom written."""
        content = [
            self.manifest["settings"],
            [shard["sha256"] for shard in self.manifest["shards"]],
            [asdict(sample) for sample in self.samples],
        ]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return Fingerprint(digest, lambda: file_hash(self.folder / MANIFEST_FILE), exact=True)

    def tensors(self, sample: DistillSample) -> dict[str, Tensor]:
        """Read one response's tensors.

        Args:
            sample: an entry of `samples`, T tokens long.

        Returns:
            prompt_states [X, taps, C]: outputs of the tapped layers at the last X prompt positions;
            states [T, taps, C]: the same at the response's tokens;
            topk_logits float32 [T, k] and topk_ids int32 [T, k]: row i predicts token i.

        Raises:
            ValueError: the shard is missing or corrupt; the message names the file.
        """
        path = shard_path(self.folder, sample.shard)
        try:
            file = self._open(sample.shard)
            tensors = {name: file.get_tensor(f"{sample.index}.{name}") for name in TENSOR_NAMES}
        except OSError as error:
            raise ValueError(f"{path}: missing or corrupt shard ({error})") from None
        self._check(path, sample, tensors)
        return tensors

    def check(self) -> None:
        """Look at every shard's length and header; the tensors are tested when they are read.

        Shards made before there were checksums are hashed whole.

        Raises:
            ValueError: a shard is missing, cut short, corrupt or of another run; the message names the file.
        """
        for name, shard in self._shards.items():
            if "header" in shard:
                require_shard(shard_path(self.folder, name), shard)
            else:
                open_shard(self.folder, shard)

    def verify(self) -> None:
        """Read every response of every shard.

        Raises:
            ValueError: the first fault; the message names the file.
        """
        for fault in self.faults().values():
            raise ValueError(fault)

    def faults(self) -> dict[str, str]:
        """Read every response of every shard: by its file, what is wrong with each that is not sound."""
        samples: dict[str, list[DistillSample]] = {name: [] for name in self._shards}
        for sample in self.samples:
            samples[sample.shard].append(sample)
        found = {}
        for name in [name for name in self._shards if name not in self.bad_shards]:
            try:
                self._files.pop(name, None)
                for sample in samples[name]:
                    self.tensors(sample)
            except ValueError as error:
                found[name] = str(error)
        return found

    def leave_out(self, names: Collection[str]) -> None:
        """Go on without some shards and their responses: the set is another one, by its identity too.

        Args:
            names: file names of shards.

        Raises:
            ValueError: no shard would remain.
        """
        if not names:
            return
        if not self._shards.keys() - set(names):
            raise ValueError(f"{self.folder}: no shard is sound; the first is {sorted(names)[0]}")
        kept = [shard for shard in self.manifest["shards"] if shard["file"] not in names]
        counts = {key: sum(shard[key] for shard in kept) for key in ("samples", "tokens", "bytes")}
        self.manifest |= {"shards": kept, **counts}
        self.manifest.pop("token_counts", None)  # they are of all shards
        self.samples = [sample for sample in self.samples if sample.shard not in names]
        self._shards = {name: shard for name, shard in self._shards.items() if name not in names}

    def _open(self, name: str) -> TensorFile:
        """Open a shard, or take it from the few kept open."""
        if name not in self._files:
            self._files[name] = open_shard(self.folder, self._shards[name])
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
        self._files.move_to_end(name)
        return self._files[name]

    def _check(self, path: Path, sample: DistillSample, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors whose shapes do not fit the sample and the manifest."""
        taps, hidden = len(self.manifest["taps"]), self.manifest["hidden_size"]
        length, top_k = len(sample.token_ids), self.manifest["top_k"]
        wanted = {
            "states": (length, taps, hidden),
            "topk_logits": (length, top_k),
            "topk_ids": (length, top_k),
        }
        wanted["prompt_states"] = (*tensors["prompt_states"].shape[:1], taps, hidden)
        for name, shape in wanted.items():
            found = tuple(tensors[name].shape)
            if found != shape:
                raise ValueError(f"{path}: corrupt shard, {sample.index}.{name} is {found}, not {shape}")
            if (tensors[name].dtype in FLOATS) == (name == "topk_ids"):
                raise ValueError(f"{path}: corrupt shard, {sample.index}.{name} is {tensors[name].dtype}")
        ids, most = tensors["topk_ids"], self.manifest["vocab_size"]
        if ids.dtype != torch.int32 or bool(((ids < 0) | (ids >= most)).any()):
            raise ValueError(
                f"{path}: corrupt shard, {sample.index}.topk_ids must be int32 ids of the target, "
                f"0 to {most - 1}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files out when a data loader's worker takes a copy."""
        return {**self.__dict__, "_files": OrderedDict()}
