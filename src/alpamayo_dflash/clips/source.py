"""Reading clips of the driving dataset, real or synthetic, through NVIDIA's devkit `physical_ai_av`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from alpamayo_dflash.clips.cache import EGOMOTION, REPO_ID, chunk_file, find_snapshot
from alpamayo_dflash.clips.config import DEFAULT_T0_US, MOTION_GAP_MS, FrameRule
from alpamayo_dflash.clips.layout import check_tables, is_clip_id
from alpamayo_dflash.clips.members import read_members
from alpamayo_dflash.clips.motion import MOTION, Poses, poses, stamps_of
from alpamayo_dflash.clips.video import Times, UnsoundError, Video, frame_of_stamp
from alpamayo_dflash.clips.window import (
    CAMERAS,
    DEFAULT_CAMERAS,
    FRAMES_PER_CAMERA,
    STEP_US,
    Window,
    check_cameras,
    whole_us,
)
from alpamayo_dflash.common.ahead import read_ahead
from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.common.options import check_positive
from alpamayo_dflash.common.tables import read_columns

Frames = npt.NDArray[np.uint8]
_MOST_ROWS = 2**20  # of a clip's table: a 20 s clip has 600 frames and 2,000 poses


class ClipError(ValueError):
    """A clip that cannot be read.

    Attributes:
        clip_id: the clip.
        reason: what is wrong.
        kind: a word for it, to count by.
    """

    def __init__(self, clip_id: str, reason: str, kind: str = "file") -> None:
        super().__init__(f"clip {clip_id}: {reason}")
        self.clip_id = clip_id
        self.reason = reason
        self.kind = kind

    def __reduce__(self) -> tuple[type[ClipError], tuple[str, str, str]]:
        return type(self), (self.clip_id, self.reason, self.kind)


def failure_kind(error: Exception) -> str:
    """A word for what made a clip fail; what is not the clip's own fault is the target's."""
    return error.kind if isinstance(error, ClipError) else "target"


def failure_kinds(failures: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many clips failed by kind of reason; older results did not record it."""
    return dict(Counter(failure.get("kind", "not recorded") for failure in failures).most_common())


class ClipSource:
    """The clips of a dataset, read as windows.

    Offline, the dataset is what the hub's cache holds, and nothing is asked of the network: the revision is
    looked up in the cache here, and the devkit is told that *this dataset* is offline. The environment
    variable `HF_HUB_OFFLINE` is neither needed nor set (it would count only before the hub's library is first
    imported, and then for every model of the process too).

    A source may be used from several threads.

    Attributes:
        cameras: dataset indices, ascending.
        noted: how often a camera was read although something about its frames is unusual, by kind.
    """

    def __init__(
        self,
        cache_dir: Path | str | None,
        *,
        revision: str = "main",
        cameras: Sequence[int] = DEFAULT_CAMERAS,
        repo_id: str = REPO_ID,
        offline: bool = True,
        frames: FrameRule = "strict",
        motion_gap_ms: int = MOTION_GAP_MS,
    ) -> None:
        """Open a dataset.

        Args:
            cache_dir: the hub cache that holds it; None, only when not offline, for the hub's own.
            revision: branch, tag or 40-digit hash.
            cameras: dataset indices of the cameras to read; they are read in ascending order.
            repo_id: the dataset's name on the hub.
            offline: read the cache only. Otherwise what the cache lacks is streamed from the hub.
            frames: what happens to a clip whose frames may not be those of its stamps: `strict` refuses it,
                `warn` reads them by their order and says so.
            motion_gap_ms: the longest gap in the ego motion around a moment that is needed.

        Raises:
            ValueError: an unknown or repeated camera, or the cache does not hold the dataset.
        """
        self.cameras = check_cameras(cameras)
        self.offline = offline
        self.noted: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._strict, self._gap_us = frames == "strict", motion_gap_ms * 1000
        if offline:
            if cache_dir is None:
                raise ValueError("cache_dir is missing: offline reading needs the folder with the dataset")
            self._snapshot: Path | None = find_snapshot(cache_dir, revision, repo_id)
            self.dataset = _open_offline(self._snapshot, Path(cache_dir), repo_id)
        else:
            self._snapshot = None
            self.dataset = open_online(cache_dir, revision, repo_id)
        self._chunk_of: dict[str, int] = {
            str(clip_id): int(chunk) for clip_id, chunk in self.dataset.clip_index["chunk"].items()
        }

    @property
    def revision(self) -> str | None:
        """The 40-digit hash of the cached revision that is read; None where the hub is asked."""
        return None if self._snapshot is None else self._snapshot.name

    def chunks(self) -> list[int]:
        """The chunks that can be read, ascending: offline those whose files are all in the cache."""
        chunks = sorted(set(self._chunk_of.values()))
        return [chunk for chunk in chunks if self._is_at_hand(chunk)] if self.offline else chunks

    def clip_ids(self, chunks: Sequence[int] | None = None) -> list[str]:
        """The clips of some chunks, or of all that can be read, sorted.

        Raises:
            ValueError: a chunk that cannot be read, or no clip at all.
        """
        at_hand = self.chunks()
        wanted = set(at_hand if chunks is None else chunks)
        missing = sorted(wanted - set(at_hand))
        if missing:
            raise ValueError(
                f"chunks {missing} are not in the dataset's cache; it holds {_ranges(at_hand)}"
                + self._lacking(missing)
            )
        clip_ids = sorted(clip_id for clip_id, chunk in self._chunk_of.items() if chunk in wanted)
        if not clip_ids:
            reason = "no chunk was asked for" if chunks is not None else "the cache holds no whole chunk"
            lacking = "" if chunks is not None else self._lacking(sorted(set(self._chunk_of.values())))
            raise ValueError(f"the list of clips is empty: {reason}{lacking}")
        return clip_ids

    def _lacking(self, chunks: Sequence[int]) -> str:
        """For a message: which file keeps the first half-fetched one of these chunks from being read."""
        for chunk in chunks:
            files = [self._file(feature, chunk) for feature in self._features()]
            lacking = [file for file in files if not self.dataset.is_file_cached(file)]
            if lacking and len(lacking) < len(files):
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                return f"; chunk {chunk} lacks {lacking[0]}{more}"
        return ""

    def chunk_of(self, clip_id: str) -> int:
        """The chunk that a clip belongs to.

        Raises:
            ClipError: there is no such clip.
        """
        if not is_clip_id(clip_id):
            raise ClipError(ascii(clip_id)[:200], "no clip id: it is a path, or holds what no name does")
        if clip_id not in self._chunk_of:
            raise ClipError(
                clip_id, f"unknown; the dataset has {len(self._chunk_of)} clips, but not this one"
            )
        return self._chunk_of[clip_id]

    def files(self, clip_id: str) -> dict[str, list[int] | None]:
        """Size and time of change (ns) of each file that a clip is read from; None for one that is not there.

        Nothing where the dataset is not a cache's.
        """
        found: dict[str, list[int] | None] = {}
        if self._snapshot is None:
            return found
        for feature in self._features():
            name = self._file(feature, self.chunk_of(clip_id))
            path = self._snapshot / name
            state = path.stat() if path.exists() else None
            found[name] = None if state is None else [state.st_size, state.st_mtime_ns]
        return found

    def changed(self, failure: Mapping[str, Any]) -> bool:
        """Whether a file that a failed clip needs is another now; older results did not record them."""
        return "files" in failure and failure["files"] != self.files(failure["clip_id"])

    def window(self, clip_id: str, t0_us: int = DEFAULT_T0_US) -> Window:
        """Read what the target sees of a clip at a moment, and what the ego did around it.

        Poses are interpolated at 10 Hz and moved to the ego frame at t0 by the whole inverse rotation, so
        that roll and pitch against t0 and changes of height stay.

        Args:
            clip_id: the clip.
            t0_us: the moment, microseconds on the clip's clock.

        Returns:
            A window; without a future where the clip ends before t0 + 6.4 s.

        Raises:
            ClipError: the clip is unknown, one of its files is missing or damaged, or t0 lies outside it.
        """
        self.chunk_of(clip_id)
        t0_us = whole_us(t0_us)
        frames = [self._frames(clip_id, CAMERAS[index], t0_us) for index in self.cameras]
        if len({frame.shape for frame in frames}) > 1:
            sizes = {CAMERAS[i]: frame.shape[1:3] for i, frame in zip(self.cameras, frames, strict=True)}
            raise ClipError(clip_id, f"its cameras' pictures differ in size: {sizes}")
        history, future = self._poses(clip_id, t0_us)
        return Window(clip_id, t0_us, self.cameras, np.stack(frames), *history, *(future or (None, None)))

    def _features(self) -> tuple[str, ...]:
        return EGOMOTION, *(CAMERAS[index] for index in self.cameras)

    def _is_at_hand(self, chunk: int) -> bool:
        return all(self.dataset.is_file_cached(self._file(feature, chunk)) for feature in self._features())

    def _file(self, feature: str, chunk: int) -> str:
        if feature not in self.dataset.features.ALL:
            return chunk_file(feature, chunk)
        name: str = self.dataset.features.get_chunk_feature_filename(chunk, feature)
        return name

    def _frames(self, clip_id: str, feature: str, t0_us: int) -> Frames:
        """The last frames [frames, height, width, 3] at or before t0 - 0.3 s ... t0 of one camera."""
        wanted = t0_us + np.arange(1 - FRAMES_PER_CAMERA, 1, dtype=np.int64) * STEP_US
        files = self._members(clip_id, feature)
        try:
            stamps = stamps_of(_table(_file_of(files, "frame_timestamps"), "frame_timestamps"))
            if wanted[0] < stamps[0] or wanted[-1] > stamps[-1]:
                raise UnsoundError(
                    "moment",
                    f"its timestamps cover {stamps[0]} to {stamps[-1]} us, but t0 = {t0_us} us needs "
                    f"{wanted[0]} to {wanted[-1]}",
                )
            rows = np.searchsorted(stamps, wanted, side="right") - 1
            late = int((wanted - stamps[rows]).max())
            if late >= STEP_US:
                raise UnsoundError(
                    "moment", f"it has no frame for {late / 1e3:.0f} ms before t0 = {t0_us} us"
                )
            with contextlib.closing(Video(_file_of(files, "video"))) as video:
                numbers = self._numbers(clip_id, feature, stamps, video)
                return np.stack(video.frames(numbers[rows].tolist(), damaged=not self._strict))
        except UnsoundError as error:
            raise ClipError(clip_id, f"{feature}: {error}", error.kind) from None
        except _damage() as error:
            raise self._explain(clip_id, feature, error) from error

    def _numbers(self, clip_id: str, feature: str, stamps: Times, video: Video) -> Times:
        """The frame of each stamp."""
        frames = len(video.times_us)
        try:
            numbers = frame_of_stamp(stamps, video.times_us)
        except UnsoundError as error:
            if self._strict or len(stamps) > frames:
                raise
            numbers = np.arange(len(stamps))
            self._note(error.kind, f"clip {clip_id}, {feature}: {error}; read by their order")
        else:
            if len(stamps) < frames:
                self._note(
                    "fewer stamps", f"clip {clip_id}, {feature}: {len(stamps)} stamps, {frames} frames"
                )
        return numbers

    def _note(self, kind: str, what: str) -> None:
        with self._lock:
            self.noted[kind] += 1
        Console(stderr=True).print(what, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def _poses(self, clip_id: str, t0_us: int) -> tuple[Poses, Poses | None]:
        """History [16] and future [64] of the ego, as positions and rotations in the ego frame at t0."""
        files = self._members(clip_id, EGOMOTION)
        try:
            return poses(_table(_file_of(files, EGOMOTION), EGOMOTION), t0_us, most_gap_us=self._gap_us)
        except UnsoundError as error:
            raise ClipError(clip_id, f"ego motion: {error}", error.kind) from None
        except _damage() as error:
            raise self._explain(clip_id, EGOMOTION, error) from error

    def _members(self, clip_id: str, feature: str) -> dict[str, bytes]:
        """The files of one feature of a clip, by the devkit's names for them."""
        file = self._file(feature, self._chunk_of[clip_id])
        try:
            names = self.dataset.features.get_clip_files_in_zip(clip_id, feature)
            with (
                self.dataset.open_file(file, maybe_stream=not self.offline) as stream,
            ):
                return read_members(stream, names)
        except _damage() as error:
            raise self._explain(clip_id, feature, error) from error

    def _explain(self, clip_id: str, feature: str, error: Exception) -> ClipError:
        file = self._file(feature, self._chunk_of[clip_id])
        problem = str(error) or "damaged"
        return ClipError(clip_id, f"cannot read {feature} from {file} ({type(error).__name__}: {problem})")


def _table(data: bytes, alias: str) -> Any:
    """A clip's table: its timestamps, and for the ego motion what the devkit interpolates."""
    kinds = {"timestamp": object} | (dict.fromkeys(MOTION, float) if alias == EGOMOTION else {})
    return read_columns(data, kinds, alias, most_rows=_MOST_ROWS).to_pandas()


def _file_of(files: Mapping[str, bytes], alias: str) -> bytes:
    """A clip's file by the devkit's name for it."""
    if alias not in files:
        raise ValueError(f"features.csv names no {alias} among {sorted(files)!r:.200}")
    return files[alias]


@functools.cache
def _damage() -> tuple[type[Exception], ...]:
    """What the devkit lets through for a file that is missing, damaged, or does not cover the times asked.

    It checks little itself: a video without frames, for instance, ends in an IndexError or a TypeError.
    """
    with needs("clips"):
        import av

    return (
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
        StopIteration,
        OSError,
        EOFError,
        RuntimeError,
        MemoryError,
        av.FFmpegError,
    )


def open_online(cache_dir: Path | str | None, revision: str, repo_id: str, **options: Any) -> Any:
    """The devkit's own interface; `options` are its constructor's."""
    with needs("clips"):
        from physical_ai_av import PhysicalAIAVDatasetInterface

    return PhysicalAIAVDatasetInterface(revision, cache_dir=cache_dir, **_named(repo_id), **options)


def _table_errors() -> tuple[type[Exception], ...]:
    """What the devkit and pandas let through for tables that are whole, but none of the dataset's."""
    with needs("clips"):
        from pandas.errors import InvalidIndexError
        from pyarrow import ArrowException

    usual = (OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError)
    return (*usual, MemoryError, ArrowException, InvalidIndexError)


def _named(repo_id: str) -> dict[str, Any]:
    """The dataset's name as the devkit takes it; 0.2.0 knows the one dataset and takes none."""
    with needs("clips"):
        from physical_ai_av import PhysicalAIAVDatasetInterface

    if "repo_id" in inspect.signature(PhysicalAIAVDatasetInterface).parameters:
        return {"repo_id": repo_id}
    if repo_id != REPO_ID:
        raise ValueError(f"this physical_ai_av reads {REPO_ID} alone, not {repo_id}; a later one reads both")
    return {}


def _open_offline(snapshot: Path, cache_dir: Path, repo_id: str) -> Any:
    """The devkit's interface on the cache alone."""
    check_tables(snapshot)
    try:
        # With the hash for a revision the hub's library takes cached files without asking for newer ones.
        return _offline_interface()(snapshot.name, cache_dir=cache_dir, **_named(repo_id))
    except _table_errors() as error:
        raise ValueError(f"{snapshot} does not hold the dataset's tables ({error})") from error


@functools.cache
def _offline_interface() -> Any:
    """The devkit's interface as a class whose instances never ask the network.

    The devkit takes its offline flag from a constant of the hub's library, which is fixed when that is first
    imported; 0.2.0 has none, and asks the hub which tables a revision has. Here the flag is the instance's
    own, and the cache answers for the hub.
    """
    from huggingface_hub import HfApi

    with needs("clips"):
        from physical_ai_av import PhysicalAIAVDatasetInterface

    class CachedHub(HfApi):
        def __init__(self, is_file_cached: Callable[[str], bool]) -> None:
            super().__init__()
            self._is_file_cached = is_file_cached

        def file_exists(self, repo_id: str, filename: str, **_: Any) -> bool:
            return self._is_file_cached(filename)

        def get_paths_info(self, repo_id: str, paths: list[str] | str, **_: Any) -> list[Any]:
            raise FileNotFoundError(f"{paths} is not in the cache")

    class OfflineInterface(PhysicalAIAVDatasetInterface):
        @property
        def is_offline_mode(self) -> bool:
            return True

        @is_offline_mode.setter
        def is_offline_mode(self, value: bool) -> None:
            """The constant that the constructor assigns does not matter here."""

        @property
        def api(self) -> CachedHub:
            return CachedHub(self.is_file_cached)

        @api.setter
        def api(self, value: HfApi) -> None:
            """Nor does its client."""

    return OfflineInterface


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, shortened: "0-3, 7"."""
    if not numbers:
        return "none"
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    runs = [numbers[a:b] for a, b in zip([0, *breaks], [*breaks, len(numbers)], strict=True)]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def iterate_windows(
    source: ClipSource,
    clip_ids: Sequence[str],
    t0_us: int = DEFAULT_T0_US,
    workers: int = 1,
    prepare: Callable[[Window], Window] | None = None,
) -> Iterator[tuple[str, Window | ClipError]]:
    """Read windows in the order given, a few ahead of what has been taken, in threads.

    A clip that cannot be read comes as its error, so that the caller can record and count it.

    Args:
        source: the dataset.
        clip_ids: the clips.
        t0_us: the moment of each, microseconds.
        workers: reading threads.
        prepare: is done to each window by the thread that read it.

    Raises:
        ValueError: the list is empty, or there is no worker.
    """
    if not clip_ids:
        raise ValueError("the list of clips is empty")
    check_positive(workers=workers)

    def read(clip_id: str) -> tuple[str, Window | ClipError]:
        try:
            window = source.window(clip_id, t0_us)
        except ClipError as error:
            return clip_id, error
        return clip_id, window if prepare is None else prepare(window)

    return read_ahead(clip_ids, read, workers)


def progressing_windows(
    source: ClipSource,
    clip_ids: Sequence[str],
    t0_us: int,
    title: str,
    *,
    workers: int = 1,
    prepare: Callable[[Window], Window] | None = None,
) -> Iterator[tuple[str, Window | ClipError]]:
    """Read windows ahead of their use, with a progress bar on standard error.

    Args:
        source: the dataset.
        clip_ids: the clips; none gives no window.
        t0_us: the moment of each, microseconds.
        title: what stands before the bar.
        workers: see `iterate_windows`.
        prepare: likewise.

    Yields:
        clip id, and its window or why it could not be read.
    """
    if not clip_ids:
        return
    windows = iterate_windows(source, clip_ids, t0_us, workers, prepare)
    yield from track(windows, title, total=len(clip_ids), console=Console(stderr=True))
