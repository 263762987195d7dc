"""Fetching chunks of the driving dataset into the hub's cache, through NVIDIA's devkit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpamayo_dflash.clips.cache import EGOMOTION, REPO_ID
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.clips.window import CAMERAS, DEFAULT_CAMERAS


@dataclass
class Download:
    """What was fetched.

    Attributes:
        already: chunks whose files were all in the cache.
        done: chunks that were fetched.
        failed: by chunk, why its files could not be.
        size_bytes: of the files of both the first two, as they lie in the cache.
    """

    already: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    size_bytes: int = 0


def download_chunks(
    cache_dir: Path | str,
    chunks: Sequence[int],
    *,
    cameras: Sequence[int] = DEFAULT_CAMERAS,
    workers: int = 8,
    revision: str = "main",
    repo_id: str = REPO_ID,
) -> Download:
    """Bring chunks' camera and ego motion files, and the dataset's tables, into the cache.

    What the cache holds is not fetched again, so an interrupted call goes on. A chunk that fails is recorded
    and the next one is tried. With everything there, nothing is asked of the network.

    Args:
        cache_dir: the hub cache; is made if it does not exist.
        chunks: which.
        cameras: dataset indices.
        workers: files at a time.
        revision: branch, tag or 40-digit hash.
        repo_id: the dataset's name on the hub.

    Raises:
        ValueError: an unknown camera or chunk, or the hub cannot be reached or does not give access.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    features = [*(_camera(index) for index in cameras), EGOMOTION]
    try:
        known = ClipSource(cache_dir, revision=revision, cameras=cameras, repo_id=repo_id)
    except ValueError:
        known = None  # nothing of the dataset is in the cache yet
    dataset: Any = known.dataset if known is not None else None
    if known is None or set(chunks) - set(known.chunks()):
        dataset = _online(cache_dir, revision, repo_id)
    unknown = sorted(set(chunks) - {int(chunk) for chunk in dataset.clip_index["chunk"].unique()})
    if unknown:
        raise ValueError(f"chunks {unknown} are not in the dataset; it has {len(dataset.clip_index)} clips")
    result = Download()
    for chunk in chunks:
        _fetch(dataset, chunk, features, workers, result)
    return result


def _fetch(dataset: Any, chunk: int, features: Sequence[str], workers: int, result: Download) -> None:
    files = [dataset.features.get_chunk_feature_filename(chunk, feature) for feature in features]
    fetched = not all(dataset.is_file_cached(file) for file in files)
    if fetched:
        try:
            dataset.download_chunk_features(chunk, features, max_workers=workers)
        except (OSError, LookupError, ValueError) as error:
            result.failed[chunk] = f"{type(error).__name__}: {error}"
            return
        absent = [file for file in files if not dataset.is_file_cached(file)]
        if absent:  # the devkit passes over what its tables say a chunk does not have
            result.failed[chunk] = f"the dataset has no {', '.join(absent)}"
            return
    (result.done if fetched else result.already).append(chunk)
    result.size_bytes += sum(Path(dataset.download_file(file)).stat().st_size for file in files)


def _camera(index: int) -> str:
    if index not in CAMERAS:
        raise ValueError(f"camera {index} is unknown; the dataset has {sorted(CAMERAS)}")
    return CAMERAS[index]


def _online(cache_dir: Path | str, revision: str, repo_id: str) -> Any:
    from physical_ai_av import PhysicalAIAVDatasetInterface

    try:
        dataset = PhysicalAIAVDatasetInterface(
            revision,
            repo_id=repo_id,
            cache_dir=cache_dir,
            confirm_download_threshold_gb=float(
                "inf"
            ),  # asking is the command line's business, not a prompt's
        )
    except OSError as error:
        raise ValueError(
            f"{repo_id}: its tables cannot be had ({type(error).__name__}: {error}); the dataset is "
            "gated: accept its terms on the hub and log in (hf auth login), and do not set HF_HUB_OFFLINE"
        ) from None
    if dataset.is_offline_mode:
        raise ValueError("HF_HUB_OFFLINE is set, and the cache lacks some of these chunks; unset it to fetch")
    return dataset
