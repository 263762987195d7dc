"""`train`, and for `--real-acceptance` the decoding that training itself knows nothing of."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.common.machine import check_memory
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import Result, SpeculativeDecoder
from alpamayo_dflash.decode.observer import Recorder
from alpamayo_dflash.distill.shards import DistillSample
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.target.checkpoint import checkpoint_folder
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.train.accept import AcceptanceCounts, Walk
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.real import SAMPLED_AT, Evaluate, RealAcceptance, RealRequest
from alpamayo_dflash.train.run import run

# Without the rules for a CoC's end, which propose beside the draft: what the simulation walks, too.
_DECODE = DecodeConfig(sentence_end="off")
_PASSES = 1.15
"""Weights, cache and passes over weights: R1's 20.6 GiB took 22.3 in all (docs/results/target_h200.json)."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a draft; see `train.run.run`."""
    if config.run.real_acceptance is None:
        return run(config)
    return run(config, partial(open_evaluate, config))


def open_evaluate(config: TrainConfig, request: RealRequest) -> Evaluate:
    """Load the target and read the held-out clips' prompts.

    Args:
        config: of the training.
        request: the draft, the held-out responses, and what memory training will take.

    Raises:
        ValueError: the target or a clip is missing or broken, or all of it does not fit the memory.
    """
    assert config.run.real_acceptance is not None
    device = request.draft.fc.weight.device
    chosen = _one_a_clip(request.held_out)[: config.run.real_acceptance_clips]
    source = ClipSource(config.run.real_acceptance)
    for sample in chosen:
        source.chunk_of(sample.clip_id)  # a clip that is not there is named before the target is loaded
    folder = checkpoint_folder(config.run.target_model, local_files_only=config.run.local_files_only)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    need = round(_PASSES * _weight_bytes(folder, dtype)) + _copy_bytes(request.draft, dtype)
    check_memory(
        need + request.training_bytes,
        device,
        f"training with the target beside it (about {need / 2**30:.1f} GiB of it for decoding)",
        "a smaller batch_size, or leave real_acceptance out",
    )
    target, _ = open_target(
        config.run.target_model,
        device=device,
        dtype=dtype,
        local_files_only=config.run.local_files_only,
        format_=config.run.target_format,
    )
    prompts = [target.prompt(source.window(sample.clip_id, sample.t0_us)).to("cpu") for sample in chosen]
    clips = [_Clip(sample.clip_id, prompt) for sample, prompt in zip(chosen, prompts, strict=True)]
    seeds = range(config.run.real_acceptance_seeds)
    return partial(_evaluate, target, clips, seeds, request.max_tokens)


@dataclass(frozen=True)
class _Clip:
    clip_id: str
    prompt: Prompt


def _one_a_clip(samples: Sequence[DistillSample]) -> list[DistillSample]:
    """The first response of each clip."""
    return list({sample.clip_id: sample for sample in reversed(samples)}.values())[::-1]


def _weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Of a checkpoint's weights, once loaded; published ones are bfloat16."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) * dtype.itemsize // 2


def _copy_bytes(draft: DFlashDraft, dtype: torch.dtype) -> int:
    """Of the draft that decodes, while it is made: in float32 and in the target's dtype."""
    return sum(parameter.numel() for parameter in draft.parameters()) * (4 + dtype.itemsize)


def _evaluate(
    target: Alpamayo, clips: Sequence[_Clip], seeds: Sequence[int], max_tokens: int, draft: DFlashDraft
) -> RealAcceptance:
    """Decode every clip greedily and at temperature 0.6 with a copy of the draft, which is left as it is.

    The decoder is made anew each time: captured rounds keep copies of a draft's tensors.
    """
    decoder = SpeculativeDecoder(target, _copied(draft), _DECODE)
    options: dict[str, Any] = {"max_new_tokens": max_tokens, "trajectories": False}
    walks, greedy, sampled = [], [], []
    for clip in clips:
        recorder, read = Recorder(), decoder.prefill(clip.prompt.to(target.device))
        greedy.append(decoder.generate(read, temperature=0.0, observer=recorder, **options))
        anchors = tuple(trace.samples[0].position for trace in recorder.rounds)
        walks.append(Walk(clip.clip_id, tuple(greedy[-1].token_ids[0]), anchors))
        sampled += [decoder.generate(read, temperature=SAMPLED_AT, seed=seed, **options) for seed in seeds]
    del decoder
    gc.collect()  # its graphs and their memory hang in a circle, and training goes on beside them
    return RealAcceptance(_counts(greedy), _counts(sampled), tuple(walks))


def _copied(draft: DFlashDraft) -> DFlashDraft:
    """The same weights in a draft of its own, not bound."""
    with torch.device(draft.fc.weight.device):
        copy = DFlashDraft(draft.config)
    copy.load_state_dict(draft.state_dict())
    return copy.eval().requires_grad_(False)


def _counts(results: Sequence[Result]) -> AcceptanceCounts:
    return AcceptanceCounts(
        sum(result.emitted for result in results), sum(result.passes for result in results)
    )
