"""How far a target in another format is from its checkpoint: words, what they name, trajectories, acceptance.

The same clips are decoded by the checkpoint's own weights at two row widths, whose difference is rounding
alone and serves as the scale, and by the other format at the first of them. Of the real models this says
nothing until somebody runs it on them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from alpamayo_dflash.clips.lists import chosen_clips
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.clips.window import Window, min_ade
from alpamayo_dflash.common.artefacts import provenance, write_record
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import Result, SpeculativeDecoder
from alpamayo_dflash.draft.formats import draft_identity
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.evaluate.arms import CLIP_ERRORS
from alpamayo_dflash.evaluate.config import CompareWeightsConfig
from alpamayo_dflash.evaluate.run import scene_facts
from alpamayo_dflash.report.tables import Table
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.target.formats import AS_STORED, TargetFormat
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.world.facts import Facts
from alpamayo_dflash.world.language import read

REFERENCE, OTHER_WIDTH, CHANGED = "checkpoint", "other row width", "changed"
"""The arms; all are compared with the first."""


@dataclass(frozen=True)
class _Clip:
    """What one arm gave on one clip.

    Attributes:
        greedy: the greedy text's ids.
        sampled: the sampled texts' ids, in the order of the samples.
        named: whether the greedy text names the scene's manoeuvre and its cause; None for real clips.
        min_ade_m: of the sampled texts' trajectories; None without a future to compare with.
        accepted: by draft, tokens and passes of both decodes with it.
    """

    greedy: list[list[int]]
    sampled: list[list[int]]
    named: tuple[bool, bool] | None
    min_ade_m: float | None
    accepted: Mapping[str, tuple[int, int]]


Rows = dict[str, _Clip]
"""By clip."""


def run(config: CompareWeightsConfig) -> dict[str, Any]:
    """Decode the clips by every arm and write the comparison.

    Returns:
        the JSON object of `config.out` without its provenance: `arms` by name, `clips` and `differing`, the
        clips whose greedy text is another one in the changed format.

    Raises:
        ValueError: bad input, or no clip could be decoded.
    """
    started = time.time()
    source = ClipSource(config.cache_dir)
    clip_ids = chosen_clips(source, chunks=config.chunks, count=config.num_samples)
    facts = scene_facts(config.cache_dir)
    parents = {
        f"draft-{number}": draft_identity(folder).hash for number, folder in enumerate(config.draft_models)
    }
    arms: dict[str, Rows] = {}
    described: dict[str, dict[str, Any]] = {}
    for format_, widths in (
        (AS_STORED, {REFERENCE: config.row_width, OTHER_WIDTH: config.other_row_width}),
        (config.target_format, {CHANGED: config.row_width}),
    ):
        target, parents["target" if format_ == AS_STORED else "changed"] = _opened(config, format_)
        for name, width in widths.items():
            arm = _Arm(target, config, width, with_drafts=name != OTHER_WIDTH)
            described[name] = {"target_weights": target.weight_formats, "row_width": width}
            arms[name] = dict(_decoded(arm, source, clip_ids, facts, name))
            del arm
        del target
    done = [clip_id for clip_id in clip_ids if all(clip_id in rows for rows in arms.values())]
    if not done:
        raise ValueError(f"none of {len(clip_ids)} clips could be decoded by every arm")
    result = {
        "arms": {name: described[name] | summary(rows, arms[REFERENCE], done) for name, rows in arms.items()},
        "clips": {"attempted": len(clip_ids), "done": len(done), "failed": len(clip_ids) - len(done)},
        "differing": [i for i in done if arms[CHANGED][i].greedy != arms[REFERENCE][i].greedy],
        "settings": {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "num_traj_samples": config.num_traj_samples,
            "seed": config.seed,
        },
    }
    write_record(config.out, result | {"provenance": provenance(config, started, parents)})
    return result | {"out": str(config.out)}


def _opened(config: CompareWeightsConfig, format_: TargetFormat) -> tuple[Alpamayo, str]:
    target, identity = open_target(
        config.alpamayo_model,
        device=config.device,
        dtype=config.dtype,
        local_files_only=config.local_files_only,
        format_=format_,
    )
    return target, identity.hash


class _Arm:
    """A target at one row width, alone and with each draft."""

    def __init__(
        self, target: Alpamayo, config: CompareWeightsConfig, row_width: int, *, with_drafts: bool
    ) -> None:
        self.target, self._config = target, config
        decode = DecodeConfig(row_width=row_width, prompt_capacity=config.prompt_capacity)
        self._alone = SpeculativeDecoder(target, config=decode)
        self._drafted = {
            str(folder): SpeculativeDecoder(target, _draft(folder, target), decode)
            for folder in (config.draft_models if with_drafts else ())
        }

    def clip(self, window: Window, facts: Facts | None) -> _Clip:
        """Decode one window greedily and sampled, and again with each draft."""
        prompt = self.target.prompt(window)
        greedy, sampled = self._both(self._alone, prompt, trajectories=True)
        accepted = {}
        for name, decoder in self._drafted.items():
            both = self._both(decoder, prompt, trajectories=False)
            accepted[name] = sum(each.emitted for each in both), sum(each.passes for each in both)
        named = None
        if facts is not None:
            manoeuvre, cause = read(greedy.coc[0])
            named = manoeuvre == facts.manoeuvre, cause == facts.cause
        error = None
        if window.ego_future_xyz is not None:
            assert sampled.pred_xyz is not None, "trajectories were asked for"
            error = float(min_ade(sampled.pred_xyz.cpu().numpy(), window.ego_future_xyz))
        return _Clip(greedy.token_ids, sampled.token_ids, named, error, accepted)

    def _both(
        self, decoder: SpeculativeDecoder, prompt: Prompt, *, trajectories: bool
    ) -> tuple[Result, Result]:
        config = self._config
        options: dict[str, Any] = {
            "seed": config.seed,
            "max_new_tokens": config.max_tokens,
            "top_p": config.top_p,
        }
        prefilled = decoder.prefill(prompt)
        greedy = decoder.generate(prefilled, temperature=0.0, trajectories=False, **options)
        sampled = decoder.generate(
            prefilled,
            temperature=config.temperature,
            num_traj_samples=config.num_traj_samples,
            trajectories=trajectories,
            **options,
        )
        return greedy, sampled


def _draft(folder: Path, target: Alpamayo) -> DFlashDraft:
    return DFlashDraft.from_pretrained(folder, dtype=target.dtype).to(target.device).eval()


@torch.inference_mode()
def _decoded(
    arm: _Arm, source: ClipSource, clip_ids: Sequence[str], facts: Mapping[str, Facts], name: str
) -> Iterator[tuple[str, _Clip]]:
    """The arm's clips; one that fails is said and left out."""
    console = Console(file=sys.stderr)
    for clip_id in track(clip_ids, name, console=console):
        try:
            yield clip_id, arm.clip(source.window(clip_id, arm._config.t0_us), facts.get(clip_id))
        except CLIP_ERRORS as error:
            console.print(f"clip {clip_id} failed: {error}", style="red", highlight=False, markup=False)


def summary(rows: Rows, reference: Rows, clip_ids: Sequence[str]) -> dict[str, Any]:
    """An arm's counts over clips.

    Args:
        rows: of the arm.
        reference: of the arm that it is compared with.
        clip_ids: that both have.

    Returns:
        shares of equal texts, `equal_greedy` and `equal_sampled` (the same seeds; of all samples); `named`,
        shares of greedy texts that name the manoeuvre and the cause, and `min_ade_m`, None where there is
        nothing to compare with; `acceptance_length` by draft.
    """
    found = [rows[clip_id] for clip_id in clip_ids]
    pairs = [(rows[clip_id], reference[clip_id]) for clip_id in clip_ids]
    samples = [a == b for one, other in pairs for a, b in zip(one.sampled, other.sampled, strict=True)]
    named = [clip.named for clip in found if clip.named is not None]
    errors = [clip.min_ade_m for clip in found if clip.min_ade_m is not None]
    drafts = found[0].accepted.keys()
    return {
        "equal_greedy": _share([one.greedy == other.greedy for one, other in pairs]),
        "equal_sampled": _share(samples),
        "named": {
            "manoeuvre": _share([manoeuvre for manoeuvre, _ in named]),
            "cause": _share([cause for _, cause in named]),
            "of": len(named),
        },
        "min_ade_m": round(sum(errors) / len(errors), 4) if errors else None,
        "acceptance_length": {name: _pooled([clip.accepted[name] for clip in found]) for name in drafts},
    }


def _share(found: Sequence[bool]) -> float | None:
    return round(sum(found) / len(found), 4) if found else None


def _pooled(counts: Sequence[tuple[int, int]]) -> float | None:
    tokens, passes = (sum(each) for each in zip(*counts, strict=True))
    return round(tokens / passes, 4) if passes else None


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The comparison: a column an arm."""
    arms: Mapping[str, Mapping[str, Any]] = result["arms"]

    def line(name: str, *keys: str) -> tuple[str, ...]:
        cells = []
        for arm in arms.values():
            value: Any = arm
            for key in keys:
                value = value.get(key) if value is not None else None
            cells.append("–" if value is None else str(value))
        return (name, *cells)

    drafts = sorted({name for arm in arms.values() for name in arm["acceptance_length"]})
    rows = (
        line("text in", "target_weights", "text"),
        line("row width", "row_width"),
        line("equal texts, greedy", "equal_greedy"),
        line("equal texts, the same seeds", "equal_sampled"),
        line("greedy text names the manoeuvre", "named", "manoeuvre"),
        line("greedy text names the cause", "named", "cause"),
        line("minADE, m", "min_ade_m"),
        *(line(f"acceptance length with {Path(name).name}", "acceptance_length", name) for name in drafts),
    )
    return [Table(f"{result['clips']['done']} clips, beside the checkpoint's own weights", ("", *arms), rows)]
