"""The data stage: this rank's clips through the target, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alpamayo_dflash.clips.lists import parse_chunks
from alpamayo_dflash.clips.source import ClipError, ClipSource, failure_kind, progressing_windows
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.ahead import Behind
from alpamayo_dflash.common.artefacts import IDENTITY, file_hash, list_hash, provenance
from alpamayo_dflash.common.identity import Fingerprint, agreed
from alpamayo_dflash.common.locks import mark_of, owned
from alpamayo_dflash.common.machine import Download
from alpamayo_dflash.common.options import check_layers, parse_layers
from alpamayo_dflash.common.ranks import own_device, share_of
from alpamayo_dflash.decode.forward import why_plain_text
from alpamayo_dflash.decode.proposer import BlockDraft
from alpamayo_dflash.decode.rollouts import Rollouts, TeacherForced
from alpamayo_dflash.distill.config import DistillConfig
from alpamayo_dflash.distill.estimate import Pace, require_disk
from alpamayo_dflash.distill.shards import manifest_path, read_manifests, write_merged
from alpamayo_dflash.distill.writer import ClipResult, RankWriter, Response
from alpamayo_dflash.layers.choice import CHOICE_FILE, read_choice
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.target.images import staged
from alpamayo_dflash.target.quantised import fp8_formats

_MOST_WAITING = 32
"""Windows whose responses may wait for the host, on the device: of R1's, each has some 10 MB."""


@dataclass(frozen=True)
class WritingDraft:
    """A draft that proposes, and who it is: what `draft_path` names, opened by the command."""

    draft: BlockDraft
    identity: Fingerprint


def run(config: DistillConfig, draft: WritingDraft | None = None) -> dict[str, Any]:
    """Write this rank's part of the set, or what is left of it.

    Args:
        config: see DistillConfig.
        draft: the one that `draft_path` names.

    Returns:
        this rank's `clips {attempted, done, failed}`, `samples`, `tokens` and `bytes`, the estimate of disk
        space, of what was written now `acceptance_length` (1 without a draft) and `windows_per_s` (of its
        first windows, see `Pace`), and whether there was nothing to do.

    Raises:
        ValueError: bad input, too little disk space, or data made with other settings in the folder.
    """
    if (config.draft_path is None) != (draft is None):
        raise ValueError(
            f"draft_path is {config.draft_path}, and {'no' if draft is None else 'a'} draft was handed over; "
            "run() takes the draft that draft_path names, as the command does"
        )
    started = time.time()
    rank, world_size = share_of(config.rank, config.world_size)
    source = ClipSource(config.cache_dir, frames=config.frames, motion_gap_ms=config.motion_gap_ms)
    chunks = config.chunk_numbers(source.chunks()) if config.chunks is None else parse_chunks(config.chunks)
    clip_ids = source.clip_ids(chunks)
    device, local = own_device(config.device), config.local_files_only
    target, identity = open_target(
        config.model_path,
        dtype=config.target_dtype,
        device=device,
        local_files_only=local,
        format_=config.target_format,
    )
    parts = read_manifests(config.output_dir)
    settings = agreed(
        data_settings(config, target, identity, clip_ids, world_size, draft=draft),
        {manifest_path(config.output_dir, part["rank"]): part["settings"] for part in parts},
        {"target": identity},
    )
    with owned(config.output_dir, mark_of(settings), rank, take_over=config.take_over):
        parents = {"target": identity.hash, **_layers_parent(config)}
        parents |= {} if draft is None else {"draft": draft.identity.hash}
        plain = why_plain_text(target)
        made = provenance(config, started, parents, device=str(target.device))
        made["weights"] = "fused" if plain is None else f"plain: {plain}"
        writer = RankWriter(
            config.output_dir,
            rank,
            settings,
            clip_ids[rank::world_size],
            clips_per_shard=max(1, config.shard_size // config.samples_per_clip),
            provenance=made,
            again=lambda failure: config.retry_failed or source.changed(failure),
        )
        nothing_to_do = writer.complete
        remaining = [clip_id for clips in writer.remaining for clip_id in clips]
        estimate, acceptance, windows_per_s = 0, None, None
        if nothing_to_do:
            write_merged(config.output_dir)
        else:
            estimate = require_disk(config.output_dir, settings, len(remaining), ranks=world_size)
            # First what may refuse: the draft may not fit the target.
            rollouts = rollouts_of(target, settings, config, None if draft is None else draft.draft)
            writer.begin()
            windows = windows_of(config, source, remaining, target.device)
            pace = Pace(len(remaining), ranks=world_size)
            write_windows(rollouts, source, windows, writer, config, pace=pace)
            windows_per_s = pace.windows_per_s
            acceptance = round(rollouts.emitted / rollouts.passes, 4) if rollouts.passes else None
        return {
            "output_dir": str(config.output_dir),
            "rank": rank,
            "world_size": world_size,
            "target_layers": settings["taps"],
            **writer.summary(),
            "frames_noted": dict(source.noted),
            "estimated_bytes": estimate,
            "acceptance_length": acceptance,
            "windows_per_s": windows_per_s,
            "nothing_to_do": nothing_to_do,
        }


def _layers_parent(config: DistillConfig) -> dict[str, str]:
    """The hash of the choice of layers, where one was read."""
    if config.layers_file is None:
        return {}
    path = Path(config.layers_file)
    return {"layers": file_hash(path / CHOICE_FILE if path.is_dir() else path)}


def rollouts_of(
    target: Alpamayo,
    settings: Mapping[str, Any],
    config: DistillConfig,
    draft: BlockDraft | None,
) -> Rollouts:
    """What writes the set's responses."""
    return Rollouts(
        target,
        taps=settings["taps"],
        context_len=config.context_len,
        max_tokens=config.max_tokens,
        draft=draft,
        config=config.decode,
    )


def data_settings(
    config: DistillConfig,
    target: Alpamayo,
    identity: Fingerprint,
    clip_ids: Sequence[str],
    world_size: int,
    *,
    draft: WritingDraft | None = None,
) -> dict[str, Any]:
    """All that decides the data; a folder holds data of one such setting only.

    A draft and a row width stand there where they are given. In float32 no draft changes the data (one that
    taps the target's last layer may change the last bits of the first token's logits, since that layer then
    has more rows), but a set says who wrote it, so another draft does not go on with it either.

    Raises:
        ValueError: a layer to tap that the target does not have, or a choice that cannot be read.
    """
    if config.layers_file is not None:
        taps = read_choice(config.layers_file)
    else:
        taps = parse_layers(config.target_layers) or ()
    check_layers(taps, target.num_layers)
    target_dtype = str(target.dtype).removeprefix("torch.")
    settings = {
        "identity": IDENTITY,
        "target": identity.hash,
        "clips": list_hash(clip_ids),
        "world_size": world_size,
        "taps": list(taps),
        "top_k": top_k_of(config, target),
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
        "target_dtype": target_dtype,
        "dtype": config.dtype or target_dtype,
    }
    settings |= fp8_formats(target)
    if draft is not None:
        settings["draft"] = draft.identity.hash
    if config.row_width is not None:
        settings["row_width"] = config.row_width
    sampled = ("context_len", "full_vocab", "samples_per_clip", "temperature", "top_p", "max_tokens")
    return settings | {key: getattr(config, key) for key in (*sampled, "shard_size", "seed", "t0_us")}


def windows_of(
    config: DistillConfig, source: ClipSource, clip_ids: Sequence[str], device: torch.device
) -> Iterator[tuple[str, Window | ClipError]]:
    """The clips' windows, read and staged by threads ahead of the model."""
    return progressing_windows(
        source,
        clip_ids,
        config.t0_us,
        "writing responses",
        workers=config.num_workers,
        prepare=lambda window: staged(window, device),
    )


def write_windows(
    rollouts: Rollouts,
    source: ClipSource,
    windows: Iterable[tuple[str, Window | ClipError]],
    writer: RankWriter,
    config: DistillConfig,
    *,
    pace: Pace | None = None,
) -> None:
    """Let the target write on the remaining clips and finish shard after shard.

    A thread brings what is kept to the host and writes the shards, while the target goes on.

    Args:
        rollouts: of the target, tapping the set's layers.
        source: knows which chunk a clip belongs to.
        windows: the clips of `writer.remaining` in order, with their windows or with why there is none.
        writer: takes the results.
        config: what is sampled and kept.
        pace: is told of every window that was written on.

    Raises:
        ValueError: a clip failed and `keep_going` is off; the message names it.
        OSError: a shard could not be written.
    """
    shards = _Shards(writer, rollouts.target.device)
    with Behind(_MOST_WAITING) as behind:
        for clip_id, window in windows:
            chunk = source.chunk_of(clip_id)
            try:
                if isinstance(window, ClipError):
                    raise window
                result = ClipResult(clip_id, chunk, respond(rollouts, window, config))
            except ValueError as error:
                if not config.keep_going:
                    raise ValueError(
                        str(error) if isinstance(error, ClipError) else f"clip {clip_id}: {error}"
                    ) from error
                kind, files = failure_kind(error), source.files(clip_id)
                result = ClipResult(clip_id, chunk, failure=str(error), kind=kind, files=files)
            behind(partial(shards.take, result, shards.download.mark()))
            if pace is not None and result.failure is None:
                pace.window_done()


class _Shards:
    """Collects results on the host and finishes a shard whenever it is whole."""

    def __init__(self, writer: RankWriter, device: torch.device) -> None:
        self._writer, self.download = writer, Download(device)
        self._results: list[ClipResult] = []

    def take(self, result: ClipResult, ready: torch.cuda.Event | None) -> None:
        """The next clip's result, whose tensors are there once `ready` is."""
        responses = tuple(
            replace(response, tensors=self.download(response.tensors, ready)) for response in result.responses
        )
        self._results.append(replace(result, responses=responses))
        if len(self._results) == len(self._writer.remaining[0]):
            self._writer.write(self._results)
            self._results = []


def top_k_of(config: DistillConfig, target: Alpamayo) -> int:
    """How many logits are kept: never more than there are unmasked tokens."""
    allowed = target.vocab_size - (0 if config.full_vocab else len(target.traj_ids))
    return min(config.top_k_logits, allowed)


def respond(rollouts: Rollouts, window: Window, config: DistillConfig) -> tuple[Response, ...]:
    """Let the target write on a window: once greedily, the other times sampled, all together.

    The prompt is read once. The sampled responses are samples 0, 1, ... of `generate` with the config's seed,
    temperature and nucleus.

    Args:
        rollouts: of the target, tapping the wanted layers.
        window: what the target sees.
        config: sampling, counts and what is kept.

    Returns:
        `samples_per_clip` responses, the greedy one first.

    Raises:
        ValueError: the window does not fit the target, or its prompt is too long.
    """
    rollouts.read(window)
    count = config.samples_per_clip
    written = rollouts.write(config.sampling, seed=config.seed, num_samples=count, greedy_first=True)
    temperatures = [0.0] + [config.temperature] * (count - 1)
    forced = rollouts.score([response.token_ids for response in written])
    return tuple(
        Response(
            token_ids=response.token_ids,
            text=rollouts.target.coc_text(response.token_ids),
            stop=response.stop,
            temperature=temperature,
            top_p=config.top_p,
            seed=config.seed,
            tensors=kept_tensors(rollouts.target, states, config),
        )
        for response, temperature, states in zip(written, temperatures, forced, strict=True)
    )


@torch.inference_mode()
def kept_tensors(target: Alpamayo, forced: TeacherForced, config: DistillConfig) -> dict[str, torch.Tensor]:
    """What is stored of one response.

    Args:
        target: the model, for the trajectory ids, which are masked unless `full_vocab`.
        forced: the target's states and logits on the response.
        config: `top_k_logits`, `full_vocab` and `dtype` are used.

    Returns:
        On the target's device: prompt_states [X, taps, C] and states [T, taps, C] in the storage dtype,
        topk_logits float32 [T, k], topk_ids int32 [T, k].
    """
    logits_TV = forced.logits
    if not config.full_vocab:
        logits_TV = logits_TV.clone()
        logits_TV[:, target.traj_ids.start : target.traj_ids.stop] = float("-inf")
    topk_logits, topk_ids = logits_TV.topk(top_k_of(config, target), dim=-1)
    dtype = forced.states.dtype if config.dtype is None else getattr(torch, config.dtype)
    return {
        # Copies of their own: a shard takes no two tensors of one storage.
        "prompt_states": _copy(forced.prompt_states.transpose(0, 1), dtype),
        "states": _copy(forced.states.transpose(0, 1), dtype),
        "topk_logits": topk_logits.to(torch.float32),
        "topk_ids": topk_ids.to(torch.int32),
    }


def _copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy, contiguous."""
    return tensor.to(dtype).clone(memory_format=torch.contiguous_format)
