"""Is the speculative output the target's own? Counted over clips, for trained and random drafts."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from alpamayo_dflash.clips.lists import chosen_clips
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.common.artefacts import IDENTITY, provenance, to_plain, write_record
from alpamayo_dflash.decode.decoder import Result, SpeculativeDecoder
from alpamayo_dflash.draft.formats import draft_identity
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.evaluate.arms import acceptance_of
from alpamayo_dflash.evaluate.config import LosslessConfig
from alpamayo_dflash.evaluate.reference import greedy_tokens
from alpamayo_dflash.evaluate.rows import LosslessRow, RowStore
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.target.formats import OPTIONS
from alpamayo_dflash.target.prompt import Prompt

_FREE = frozenset(("draft_models", "cache_dir", "alpamayo_model", "chunks", "num_samples", "out", *OPTIONS))
"""Options that name places, or clips that are listed by their ids."""


@dataclasses.dataclass(frozen=True)
class NamedDraft:
    """A draft under test.

    Attributes:
        name: kind and block size, such as `trained-8`.
        kind: trained or random.
        draft: the network.
    """

    name: str
    kind: str
    draft: DFlashDraft


def run(config: LosslessConfig) -> dict[str, Any]:
    """Check every clip, or the rest of an interrupted check; write the counts.

    Raises:
        ValueError: bad input; the message names it.
    """
    started = time.time()
    clip_source = ClipSource(config.cache_dir)
    clip_ids = chosen_clips(clip_source, chunks=config.chunks, count=config.num_samples)
    drafts = named_drafts(config)
    target, identity = open_target(
        config.alpamayo_model, device=config.device, dtype="float32", format_=config.target_format
    )
    checker = Checker(target, drafts, config)
    parents = {"target": identity.hash}
    parents |= {
        f"draft-{number}": draft_identity(folder).hash for number, folder in enumerate(config.draft_models)
    }
    options = {name: value for name, value in to_plain(config).items() if name not in _FREE}
    head = {"identity": IDENTITY, "options": options, "parents": parents, "clips": clip_ids}
    store: RowStore[LosslessRow] = RowStore(config.out.with_suffix(".rows.jsonl"), head)
    for clip_id in track(clip_ids, "lossless", console=Console(file=sys.stderr)):
        if clip_id not in store:
            prompt = target.prompt(clip_source.window(clip_id, config.t0_us))
            store.add(checker.check(clip_id, prompt))
    result = lossless_summary(store.rows(), drafts)
    settings = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "dtype": "float32",
        "target_weights": target.weight_formats,
    }
    made = provenance(config, started, parents)
    write_record(config.out, result | {"settings": settings, "provenance": made})
    store.remove()
    return result | {"out": str(config.out)}


def named_drafts(config: LosslessConfig) -> list[NamedDraft]:
    """The trained drafts, and a random one of each one's shape.

    Raises:
        ValueError: a folder is no draft's, or two drafts have one block size.
    """
    found: list[NamedDraft] = []
    for folder in config.draft_models:
        trained = DFlashDraft.from_pretrained(folder, dtype=torch.float32)
        twin = DFlashDraft.random(trained.config, seed=config.seed).eval()
        size = trained.block_size
        if any(each.name == f"trained-{size}" for each in found):
            raise ValueError(
                f"{folder}: block size {size} is given twice; give one draft for each block size"
            )
        found += [
            NamedDraft(f"trained-{size}", "trained", trained),
            NamedDraft(f"random-{size}", "random", twin),
        ]
    return found


class Checker:
    """Decodes a prompt in every way that must give the same tokens.

    Args:
        target: in float32.
        drafts: to compare with no draft.
        config: the options.

    Raises:
        ValueError: a draft does not fit the target.
    """

    def __init__(self, target: Alpamayo, drafts: Sequence[NamedDraft], config: LosslessConfig) -> None:
        self.target = target
        self.config = config
        self._plain = SpeculativeDecoder(target)
        self._speculative = {each.name: SpeculativeDecoder(target, each.draft) for each in drafts}

    def check(self, clip_id: str, prompt: Prompt) -> LosslessRow:
        """Compare all outputs on one clip."""
        expected = self._decode(self._plain, prompt)
        reference = greedy_tokens(self.target, prompt, max_new_tokens=self.config.max_tokens)
        found = {name: self._decode(decoder, prompt) for name, decoder in self._speculative.items()}
        pairs = [("transformers, greedy", expected["greedy"].token_ids, reference)]
        for name, results in found.items():
            pairs += [
                (f"{name}, {mode}", expected[mode].token_ids, results[mode].token_ids) for mode in results
            ]
        return {
            "clip_id": clip_id,
            "autoregressive_equals_transformers": reference == expected["greedy"].token_ids,
            "greedy": {name: _same(results, expected, "greedy") for name, results in found.items()},
            "sampled": {name: _same(results, expected, "sampled") for name, results in found.items()},
            "acceptance": {name: acceptance_of(results["greedy"]) for name, results in found.items()},
            "differences": [f"{what}: {difference(a, b)}" for what, a, b in pairs if a != b],
        }

    def _decode(self, decoder: SpeculativeDecoder, prompt: Prompt) -> dict[str, Result]:
        """Decode greedily and sampled after one reading of the prompt."""
        prefilled = decoder.prefill(prompt)
        temperatures = {"greedy": 0.0, "sampled": self.config.temperature}
        return {
            mode: decoder.generate(
                prefilled,
                temperature=temperature,
                top_p=self.config.top_p,
                seed=self.config.seed,
                max_new_tokens=self.config.max_tokens,
                trajectories=False,
            )
            for mode, temperature in temperatures.items()
        }


def _same(results: Mapping[str, Result], expected: Mapping[str, Result], mode: str) -> bool:
    return results[mode].token_ids == expected[mode].token_ids


def difference(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> str:
    """Where two outputs part: sample, position and the two token ids there."""
    for sample, (one, other) in enumerate(zip(expected, found, strict=True)):
        for position, (a, b) in enumerate(itertools.zip_longest(one, other)):
            if a != b:
                return f"sample {sample}, position {position}: {a} expected, {b} found"
    return "none"


def lossless_summary(rows: Sequence[LosslessRow], drafts: Sequence[NamedDraft]) -> dict[str, Any]:
    """Counts over clips; `passed` says whether all outputs were equal on all clips."""
    of = len(rows)
    tables = []
    for each in drafts:
        counts = [row["acceptance"][each.name] for row in rows]
        passes = sum(count["passes"] for count in counts)
        emitted = sum(count["tokens_after_first"] for count in counts)
        tables.append(
            {
                "name": each.name,
                "kind": each.kind,
                "block_size": each.draft.block_size,
                "greedy_identical": sum(row["greedy"][each.name] for row in rows),
                "sampled_identical": sum(row["sampled"][each.name] for row in rows),
                "of": of,
                "greedy_acceptance_length": round(emitted / passes, 4) if passes else None,
            }
        )
    equal = sum(row["autoregressive_equals_transformers"] for row in rows)
    differences = {row["clip_id"]: row["differences"] for row in rows if row["differences"]}
    return {
        "clips": of,
        "autoregressive_equals_transformers": equal,
        "drafts": tables,
        "differences": differences,
        "passed": of > 0 and not differences,
    }
