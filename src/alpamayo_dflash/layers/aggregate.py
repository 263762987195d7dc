"""Pooling of all ranks' scores, and the choice made from them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from alpamayo_dflash.common.artefacts import file_hash, provenance, read_json, write_record
from alpamayo_dflash.common.fields import checked, naming
from alpamayo_dflash.common.options import check_layers, parse_layers
from alpamayo_dflash.common.ranks import require_same
from alpamayo_dflash.layers.choice import CHOICE_FILE, RULE, choose_taps, progress, reasons
from alpamayo_dflash.layers.config import LayersConfig
from alpamayo_dflash.layers.score import Scores

_NAME = re.compile(r"scores-rank(\d+)of(\d+)\.json")


class Sums(TypedDict):
    """`Scores` as JSON: state sums [L, C], and the early-exit sums by candidate layer."""

    tokens: int
    state_sums: list[list[float]]
    ce_sums: dict[str, float]


class Counts(TypedDict):
    """What became of a rank's clips."""

    attempted: int
    done: int
    failed: int


class FailureEntry(TypedDict):
    """A clip that failed; older files lack the kind and the clip's files."""

    clip_id: str
    reason: str
    kind: NotRequired[str]
    files: NotRequired[dict[str, list[int] | None]]


class Settings(TypedDict):
    """The setting that is read; others are only compared."""

    target: str


class ScoresFile(TypedDict):
    """A rank's file of scores."""

    settings: Settings
    scores: Sums
    clips: Counts
    failures: list[FailureEntry]


def read_scores(path: Path) -> dict[str, Any]:
    """Read a rank's file of scores.

    Raises:
        ValueError: it is missing or none; the message names file and key.
    """
    content = read_json(path)
    scores = checked(content, ScoresFile, str(path))["scores"]
    widths = {len(state) for state in scores["state_sums"]}
    if len(widths) != 1 or 0 in widths:
        raise ValueError(f"{path}: scores.state_sums has layers of widths {sorted(widths)[:9]}; one is right")
    layers = {str(layer) for layer in range(len(scores["state_sums"]))}
    strange = [layer for layer in scores["ce_sums"] if layer not in layers]
    if strange or not scores["ce_sums"]:
        found = f"{strange[0]!r:.100}" if strange else "no layer"
        raise ValueError(f"{path}: scores.ce_sums names {found}; there are layers 0 to {len(layers) - 1}")
    if scores["tokens"] < 0:
        raise ValueError(f"{path}: scores.tokens is {scores['tokens']}; it must be at least 0")
    return content


def aggregate(config: LayersConfig, world_size: int | None) -> dict[str, Any]:
    """Pool all ranks' files, choose the taps and write `layers.json`.

    Args:
        config: `output_dir`, `layers` and `num_target_layers` are used.
        world_size: number of ranks; None to take it from the files.

    Returns:
        The content of `layers.json`.

    Raises:
        ValueError: see `score_files` and `pool`; or a candidate that was not scored.
    """
    started = time.time()
    paths = score_files(config.output_dir, world_size)
    scores, about = pool(paths)
    num_layers = len(scores.state_sums)
    cosine, early_exit_ce = scores.cosine(), scores.early_exit_ce()
    if not all(map(math.isfinite, (*cosine, *early_exit_ce.values()))):
        raise ValueError(f"{config.output_dir}: the pooled scores are not finite")
    candidates = parse_layers(config.layers) or tuple(sorted(set(early_exit_ce) - {num_layers - 1}))
    check_layers(candidates, num_layers)
    unscored = [layer for layer in candidates if layer not in early_exit_ce]
    if unscored:
        raise ValueError(f"layers {unscored} were not scored; scored are {sorted(early_exit_ce)}")
    progress_of = progress(cosine, early_exit_ce, candidates)
    taps = choose_taps(progress_of, config.num_target_layers)
    parents = {path.name: file_hash(path) for path in paths} | {"target": about["settings"]["target"]}
    content = {
        "target_layers": list(taps),
        "num_target_layers": num_layers,
        "cosine": cosine,
        "early_exit_ce": {str(layer): value for layer, value in early_exit_ce.items()},
        "progress": {str(layer): value for layer, value in progress_of.items()},
        "rule": RULE,
        "reasons": reasons(taps, progress_of, cosine, early_exit_ce),
        "tokens": scores.tokens,
        **about,
        "provenance": provenance(config, started, parents, identity=about["settings"].get("identity", 1)),
    }
    write_record(config.output_dir / CHOICE_FILE, content)
    return content


def score_files(folder: Path, world_size: int | None) -> list[Path]:
    """The files of all ranks, in order.

    Args:
        folder: the output folder.
        world_size: number of ranks; None to take it from the files' names.

    Raises:
        ValueError: no file, files of several world sizes, or a rank's file missing; the message names it.
    """
    names = [_NAME.fullmatch(path.name) for path in folder.glob("scores-rank*.json")]
    sizes = sorted({int(match[2]) for match in names if match})
    if world_size is None:
        if not sizes:
            raise ValueError(f"{folder}: no scores-rank<r>of<w>.json to pool")
        if len(sizes) > 1:
            raise ValueError(f"{folder} holds scores for world sizes {sizes}; name one with world_size")
        world_size = sizes[0]
    paths = [scores_path(folder, rank, world_size) for rank in range(world_size)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"{folder}: cannot pool, missing {', '.join(missing)}")
    return paths


def scores_path(folder: Path, rank: int, world_size: int) -> Path:
    """Where a rank's scores lie."""
    return folder / f"scores-rank{rank}of{world_size}.json"


def pool(paths: Sequence[Path]) -> tuple[Scores, dict[str, Any]]:
    """Pool the ranks' sums over tokens.

    Returns:
        the pooled scores, and the settings, clip counts and failures of all ranks.

    Raises:
        ValueError: a file is broken, or was made with other settings than the first.
    """
    scores: Scores | None = None
    about: dict[str, Any] = {"clips": {"attempted": 0, "done": 0, "failed": 0}, "failures": []}
    for path in paths:
        content = read_scores(path)
        part = Scores.from_plain(content["scores"])
        if scores is None:
            scores, about["settings"] = part, content["settings"]
        else:
            require_same(content["settings"], about["settings"], path)
            with naming(str(path)):
                scores.add(part)
        for key in about["clips"]:
            about["clips"][key] += content["clips"][key]
        about["failures"] += content["failures"]
    assert scores is not None
    if scores.tokens == 0:
        raise ValueError(f"{paths[0].parent}: no clip was scored; the reasons are in the files' failures")
    return scores, about
