"""The layers stage: score this rank's clips, pool all ranks, choose the taps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpamayo_dflash.clips.lists import parse_chunks, sample_clips
from alpamayo_dflash.clips.source import (
    ClipError,
    ClipSource,
    failure_kind,
    failure_kinds,
    progressing_windows,
)
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.artefacts import IDENTITY, list_hash, provenance, write_record
from alpamayo_dflash.common.extras import check_extras
from alpamayo_dflash.common.identity import Fingerprint, agreed
from alpamayo_dflash.common.locks import mark_of, owned
from alpamayo_dflash.common.options import check_layers, parse_layers
from alpamayo_dflash.common.ranks import own_device, require_same, share_of
from alpamayo_dflash.decode.rollouts import Rollouts
from alpamayo_dflash.layers.aggregate import aggregate, read_scores, scores_path
from alpamayo_dflash.layers.choice import CHOICE_FILE
from alpamayo_dflash.layers.config import LayersConfig
from alpamayo_dflash.layers.score import Scores, score_response
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.target.quantised import fp8_formats

PLOT_FILE = "layers.png"


def run(config: LayersConfig) -> dict[str, Any]:
    """Score, and aggregate where this process is alone or was asked to.

    Returns:
        `clips {attempted, done, failed}` and `tokens`; of a rank `scores_file` and whether it was there
        already; after aggregation `target_layers` with the reasons and the files written.

    Raises:
        ValueError: bad input; the message names it.
        MissingPackageError: a library of the plot is not installed.
    """
    if config.plot:
        check_extras("report")
    if config.aggregate:
        return _aggregated(config, config.world_size)
    rank, world_size = share_of(config.rank, config.world_size)
    answer = _score_rank(config, rank, world_size)
    return {**answer, **_aggregated(config, world_size)} if world_size == 1 else answer


def _aggregated(config: LayersConfig, world_size: int | None) -> dict[str, Any]:
    """Pool, choose and draw."""
    content = aggregate(config, world_size)
    answer = {key: content[key] for key in ("target_layers", "reasons", "clips", "tokens")}
    answer["layers_file"] = str(config.output_dir / CHOICE_FILE)
    if config.plot:
        from alpamayo_dflash.report.page.plots import plot_scores

        plot_scores(content, config.output_dir / PLOT_FILE)
        answer["plot"] = str(config.output_dir / PLOT_FILE)
    return answer


def _score_rank(config: LayersConfig, rank: int, world_size: int) -> dict[str, Any]:
    """Score this rank's clips and write its file, unless it is there already."""
    started = time.time()
    assert config.model_path is not None
    assert config.cache_dir is not None
    source = ClipSource(config.cache_dir, frames=config.frames, motion_gap_ms=config.motion_gap_ms)
    clip_ids = source.clip_ids(parse_chunks(config.chunks))
    device, local = own_device(config.device), config.local_files_only
    target, identity = open_target(
        config.model_path,
        dtype=config.dtype,
        device=device,
        local_files_only=local,
        format_=config.target_format,
    )
    paths = sorted(config.output_dir.glob(f"scores-rank*of{world_size}.json"))
    settings = agreed(
        scoring_settings(config, target, identity, clip_ids, world_size),
        {path: read_scores(path)["settings"] for path in paths},
        {"target": identity},
    )
    path = scores_path(config.output_dir, rank, world_size)
    with owned(config.output_dir, mark_of(settings), rank, take_over=config.take_over):
        content = _scored(path, settings, source, retry=config.retry_failed)
        found = content is not None
        if content is None:
            share = {"rank": rank, "world_size": world_size}
            own = sample_clips(clip_ids, config.num_samples, seed=config.seed, **share)
            windows = progressing_windows(source, own, config.t0_us, "scoring layers")
            scored = score_windows(target, windows, settings["layers"], config)
            for failure in scored.failures:
                failure["files"] = source.files(failure["clip_id"])
            content = {
                "settings": settings,
                **scored.to_plain(),
                "provenance": provenance(
                    config, started, {"target": identity.hash}, device=str(target.device)
                ),
            }
            write_record(path, content)
    return {
        "rank": rank,
        "world_size": world_size,
        "clips": content["clips"],
        "failure_kinds": failure_kinds(content["failures"]),
        "frames_noted": dict(source.noted),
        "tokens": content["scores"]["tokens"],
        "scores_file": str(path),
        "nothing_to_do": found,
    }


def _scored(
    path: Path, settings: Mapping[str, Any], source: ClipSource, *, retry: bool
) -> dict[str, Any] | None:
    """A rank's scores of before; None if there are none, or a clip that failed is to be tried again."""
    if not path.exists():
        return None
    content = read_scores(path)
    require_same(content["settings"], settings, path)
    again = any(retry or source.changed(failure) for failure in content["failures"])
    return None if again else content


def scoring_settings(
    config: LayersConfig, target: Alpamayo, identity: Fingerprint, clip_ids: Sequence[str], world_size: int
) -> dict[str, Any]:
    """All that decides the scores; parts that differ in it are never pooled.

    Raises:
        ValueError: a candidate that the target does not have, or too few candidates for the choice.
    """
    last = target.num_layers - 1
    candidates = parse_layers(config.layers) or tuple(range(last))
    check_layers(candidates, target.num_layers)
    if config.num_target_layers > len(candidates):
        raise ValueError(f"num_target_layers is {config.num_target_layers}, but candidates are {candidates}")
    settings = {
        "identity": IDENTITY,
        "target": identity.hash,
        "clips": list_hash(clip_ids),
        "world_size": world_size,
        "layers": sorted({*candidates, last}),
        "dtype": str(target.dtype).removeprefix("torch."),
    }
    settings |= fp8_formats(target)
    sampled = ("num_samples", "seed", "t0_us", "temperature", "top_p", "max_tokens")
    return settings | {key: getattr(config, key) for key in sampled}


@dataclass
class ScoredClips:
    """Scores over clips, and what became of each clip."""

    scores: Scores
    done: list[str] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        """What the scores' file holds of it."""
        done, failed = len(self.done), len(self.failures)
        return {
            "scores": self.scores.to_plain(),
            "clips": {"attempted": done + failed, "done": done, "failed": failed},
            "clip_ids": self.done,
            "failures": self.failures,
        }


def score_windows(
    target: Alpamayo,
    windows: Iterable[tuple[str, Window | ClipError]],
    candidates: Sequence[int],
    config: LayersConfig,
) -> ScoredClips:
    """Let the target write on each window and score every layer on what it wrote.

    Args:
        target: the model.
        windows: clip ids with their windows, or with why there is none.
        candidates: layers to leave early at.
        config: sampling, seed and token limit are used.

    Returns:
        The sums over all generated tokens; a clip that failed is listed with its reason.
    """
    layers = range(target.num_layers)
    rollouts = Rollouts(target, taps=layers, context_len=1, max_tokens=config.max_tokens)
    scored = ScoredClips(Scores.empty(target.num_layers, target.hidden_size, candidates))
    for clip_id, window in windows:
        try:
            if isinstance(window, ClipError):
                raise window
            rollouts.read(window)
            token_ids = rollouts.write(config.sampling, seed=config.seed)[0].token_ids
            forced = rollouts.score([token_ids])[0]
        except ValueError as error:
            scored.failures.append({"clip_id": clip_id, "reason": str(error), "kind": failure_kind(error)})
            continue
        before_LC = forced.prompt_states[:, -1]
        scored.scores.add(score_response(target, forced.states, before_LC, token_ids, candidates))
        scored.done.append(clip_id)
    return scored
