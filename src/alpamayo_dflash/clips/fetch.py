"""Fetching chunks of the driving dataset into the hub's cache, through NVIDIA's devkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError

from alpamayo_dflash.clips.cache import EGOMOTION, REPO_ID, find_snapshot, repo_folder
from alpamayo_dflash.clips.source import ClipSource, open_online
from alpamayo_dflash.clips.window import CAMERAS, DEFAULT_CAMERAS, check_cameras
from alpamayo_dflash.common.artefacts import write_text
from alpamayo_dflash.common.hub import ended
from alpamayo_dflash.common.options import check_positive

# What a request to the hub can end in. The errors of its library's HTTP client (requests, httpx or httpx2, by
# version) are OSErrors only in the first. RuntimeError is what its transfer library hf_xet mostly raises.
_HUB_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"),
)


@dataclass
class Download:
    """What was fetched.

    Attributes:
        revision: the 40-digit hash that the files are of.
        main: the hash that the cache calls `main`, which is what the later steps read.
        already: chunks whose files were all in the cache.
        done: chunks that were fetched.
        failed: by chunk, why its files could not be.
        size_bytes: of the files of both the first two, as they lie in the cache.
    """

    revision: str
    main: str
    already: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    size_bytes: int = 0


def download_chunks(
    cache_dir: Path | str,
    chunks: Sequence[int] = (),
    *,
    clip_ids: Sequence[str] = (),
    cameras: Sequence[int] = DEFAULT_CAMERAS,
    workers: int = 8,
    revision: str = "main",
    repo_id: str = REPO_ID,
) -> Download:
    """Bring chunks' camera and ego motion files, and the dataset's tables, into the cache.

    What the cache holds is not fetched again, so an interrupted call goes on, at the commit that it began
    with. A file that fails is recorded with its chunk and the others are tried. With everything there,
    nothing is asked of the network. A cache without a `main` gets the fetched revision for it.

    Args:
        cache_dir: the hub cache; is made if it does not exist.
        chunks: which.
        clip_ids: clips whose chunks are fetched too.
        cameras: dataset indices.
        workers: files at a time, of whichever chunks.
        revision: branch, tag or 40-digit hash; a branch or tag that the cache knows is what the cache says.
        repo_id: the dataset's name on the hub.

    Raises:
        ValueError: an unknown camera, chunk or clip, or the hub cannot be reached or does not give access.
    """
    check_positive(workers=workers)
    features = [*(CAMERAS[index] for index in check_cameras(cameras)), EGOMOTION]
    cached = _cached(cache_dir, revision, repo_id)
    dataset = _online(cache_dir, revision, repo_id) if cached is None else cached
    files = _files(dataset, _wanted(dataset, chunks, clip_ids), features)
    missing = {
        chunk: [name for name in names if not dataset.is_file_cached(name)] for chunk, names in files.items()
    }
    if cached is not None and any(missing.values()):
        dataset = _online(cache_dir, revision, repo_id)
    result = Download(dataset.revision, _main(cache_dir, dataset.revision, repo_id))
    result.failed = _fetch(dataset, missing, workers, repo_folder(cache_dir, repo_id))
    for chunk in sorted(set(files) - set(result.failed)):
        (result.done if missing[chunk] else result.already).append(chunk)
        result.size_bytes += sum(Path(dataset.download_file(name)).stat().st_size for name in files[chunk])
    return result


def _wanted(dataset: Any, chunks: Sequence[int], clip_ids: Sequence[str]) -> list[int]:
    """The chunks and those of the clips, each once, ascending."""
    chunk_of = {str(clip_id): int(chunk) for clip_id, chunk in dataset.clip_index["chunk"].items()}
    strange = [clip_id for clip_id in clip_ids if clip_id not in chunk_of]
    if strange:
        raise ValueError(
            f"{len(strange)} clips are not in the dataset at {dataset.revision}, such as {strange[0]}; "
            f"it has {len(chunk_of)} clips"
        )
    unknown = sorted(set(chunks) - set(chunk_of.values()))
    if unknown:
        raise ValueError(
            f"chunks {unknown} are not in the dataset at {dataset.revision}; it has {len(chunk_of)} clips"
        )
    return sorted({*chunks, *(chunk_of[clip_id] for clip_id in clip_ids)})


def _files(dataset: Any, chunks: Sequence[int], features: Sequence[str]) -> dict[int, list[str]]:
    """By chunk, the names of its files in the repository."""
    known = sorted(dataset.features.ALL)
    unknown = [feature for feature in features if feature not in known]
    if unknown:
        raise ValueError(
            f"the dataset at {dataset.revision} has no {', '.join(unknown)}; it has {', '.join(known)}"
        )
    name = dataset.features.get_chunk_feature_filename
    return {chunk: [name(chunk, feature) for feature in features] for chunk in chunks}


def _fetch(dataset: Any, missing: Mapping[int, Sequence[str]], workers: int, folder: Path) -> dict[int, str]:
    """Fetch files, given by chunk, into the repository's folder; by chunk, why some could not be."""
    tasks = [(chunk, name) for chunk, names in missing.items() for name in names]
    with ThreadPoolExecutor(workers) as pool:  # map cancels what has not begun when it is interrupted
        reasons = list(pool.map(lambda task: _fetch_file(dataset, task[1], folder), tasks))
    failed: dict[int, dict[str, None]] = {}  # by chunk its different reasons, in order
    for (chunk, _), reason in zip(tasks, reasons, strict=True):
        if reason is not None:
            failed.setdefault(chunk, {})[reason] = None
    return {chunk: "; ".join(texts) for chunk, texts in failed.items()}


def _fetch_file(dataset: Any, name: str, folder: Path) -> str | None:
    """Fetch one file; returns why it could not be, or None."""
    try:
        ended(partial(dataset.download_file, name), name, folder)
    except _HUB_ERRORS as error:
        return _reason(error)
    except ValueError as error:  # the devkit's, for a file that the hub does not have
        return _reason(error)
    except IndexError:  # for the same, of physical_ai_av 0.2.0
        return f"{name!r} not found in {dataset.repo_id}"
    return None


def _reason(error: Exception) -> str:
    """An error's text on one line, and its cause's: only there does the hub's library name a refusal."""
    texts = [f"{type(each).__name__}: {each}" for each in (error, error.__cause__) if each is not None]
    return " ".join(" from ".join(texts).split())


def _main(cache_dir: Path | str, commit: str, repo_id: str) -> str:
    """The commit that the cache calls `main`; one without a `main` gets this, as the later steps read it."""
    reference = repo_folder(cache_dir, repo_id) / "refs" / "main"
    if not reference.is_file():
        write_text(reference, commit)
    return reference.read_text(encoding="utf-8").strip()


def _cached(cache_dir: Path | str, revision: str, repo_id: str) -> Any:
    """The dataset as far as the cache holds it; None if that lacks the revision or one of its tables."""
    try:
        return ClipSource(cache_dir, revision=revision, repo_id=repo_id).dataset
    except ValueError:
        return None


def _commit(cache_dir: Path | str, revision: str, repo_id: str) -> str:
    """The hash that the cache has for a revision, or the revision itself."""
    try:
        return find_snapshot(cache_dir, revision, repo_id).name
    except ValueError:
        return revision


def _online(cache_dir: Path | str, revision: str, repo_id: str) -> Any:
    """The dataset with its tables, where what the cache lacks is fetched.

    It is opened at a commit, so that a branch that moves on does not mix two states of the dataset in one
    cache. A name that the cache does not know yet is opened first: the hub's library then notes its commit.
    """
    commit = _commit(cache_dir, revision, repo_id)
    dataset = _open(cache_dir, commit, repo_id)
    noted = _commit(cache_dir, revision, repo_id)
    return dataset if noted == commit else _open(cache_dir, noted, repo_id)


def _open(cache_dir: Path | str, revision: str, repo_id: str) -> Any:
    unasked = {"confirm_download_threshold_gb": float("inf")}  # to ask is not a library's business
    try:
        opening = partial(open_online, cache_dir, revision, repo_id, **unasked)
        dataset = ended(opening, "the dataset's tables", repo_folder(cache_dir, repo_id))
    except _HUB_ERRORS as error:
        raise ValueError(
            f"{repo_id}: its tables cannot be had ({_reason(error)}); the dataset is gated: accept its terms "
            "on the hub and log in (hf auth login), and do not set HF_HUB_OFFLINE"
        ) from None
    if HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, and the cache lacks some of these chunks; unset it to fetch")
    return dataset
