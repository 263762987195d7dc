"""A camera's video, read by the times that its frames carry.

Which frame belongs to which stamp of the dataset's table is a question of its own (`frame_of_stamp`): the
devkit answers it by counting at a constant rate, so that a dropped frame, or a first frame that is not at 0,
gives others than were asked for.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from alpamayo_dflash.common.extras import needs

Times = npt.NDArray[np.int64]
MOST_US = 10**15
"""The latest time, microseconds: 31 years."""

_MOST_PIXELS = 2**25  # 8192 × 4096
_MOST_FRAMES = 2**16  # a 20 s clip has 600
_LIMITS = {"max_pixels": str(_MOST_PIXELS)}
_CODECS = ("h264", "hevc", "av1", "libdav1d", "vp9", "mpeg4")
_UNIT = 1 << 16  # 1.0 in the first two columns of a display matrix
_QUARTERS = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 3, (-1, 0, 0, -1): 2, (0, -1, 1, 0): 1}
"""Turns by 90 degrees (as numpy's `rot90` counts them) by the display matrix's upper left."""


class UnsoundError(ValueError):
    """What keeps a clip's files from being read as what they are asked for.

    Attributes:
        kind: a word for it, to count by.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Video:
    """An MP4's one video stream.

    Args:
        data: the file's content.

    Attributes:
        times_us: the frames' own times in display order, ascending, microseconds.

    Raises:
        UnsoundError: there is no video stream, no frame, or one without a time of its own.
        av.FFmpegError: the file is damaged.
    """

    def __init__(self, data: bytes) -> None:
        with needs("clips"):
            import av
            from av.codec.context import ThreadType

        # Of an MP4 alone, for other formats (playlists) name files and addresses to read.
        container: Any = av.open(io.BytesIO(data), format="mp4", options=dict(_LIMITS))
        self._container = container
        if not container.streams.video:
            raise UnsoundError("video", "the file holds no video")
        self._stream = container.streams.video[0]
        self._check_stream()
        self._stream.thread_type, self._stream.thread_count = ThreadType.AUTO, 1
        packets: list[Any] = []
        for packet in container.demux(self._stream):
            if packet.size and not packet.is_discard:
                packets.append(packet)
            if len(packets) > _MOST_FRAMES:
                raise UnsoundError("video", f"the video has more than {_MOST_FRAMES} frames")
        if not packets or any(packet.pts is None for packet in packets):
            raise UnsoundError("video", "the video has no frames, or frames without times")
        self._pts: list[int] = sorted(packet.pts for packet in packets)
        self._keys: list[int] = sorted(packet.pts for packet in packets if packet.is_keyframe)
        if len(set(self._pts)) != len(self._pts):
            raise UnsoundError("video", "the video has two frames of one time")
        tick_us = Fraction(self._stream.time_base or 0) * 1_000_000
        if max(map(abs, self._pts)) * tick_us > MOST_US:
            raise UnsoundError("video", f"the video has a frame's time beyond {MOST_US} us")
        self.times_us: Times = np.array([round(pts * tick_us) for pts in self._pts], dtype=np.int64)

    def _check_stream(self) -> None:
        """Refuse what no camera writes before anything is decoded, and bound what the decoder takes."""
        codec = self._stream.codec_context
        if codec is None or codec.name not in _CODECS:
            found = None if codec is None else codec.name
            raise UnsoundError("video", f"the video's codec is {found}; read are {', '.join(_CODECS)}")
        if not 0 < codec.width * codec.height <= _MOST_PIXELS:
            raise UnsoundError(
                "video",
                f"the video is {codec.width} × {codec.height}; at most {_MOST_PIXELS} pixels are read",
            )
        codec.options = dict(_LIMITS)

    def close(self) -> None:
        """Let the file go."""
        self._container.close()

    def frames(self, numbers: Sequence[int], *, damaged: bool = False) -> list[npt.NDArray[np.uint8]]:
        """Decode frames.

        Args:
            numbers: which, counted in display order; each key frame before one is sought once.
            damaged: take frames that the decoder marks as corrupt too.

        Returns:
            uint8 [height, width, 3] RGB of each, turned as the file says.

        Raises:
            UnsoundError: a frame is not there, is corrupt, or is to be shown mirrored or at an angle.
        """
        wanted = {self._pts[number] for number in numbers}
        found: dict[int, npt.NDArray[np.uint8]] = {}
        by_key: dict[int, list[int]] = {}
        for pts in sorted(wanted):
            place = bisect.bisect_right(self._keys, pts) - 1
            by_key.setdefault(self._keys[max(place, 0)] if self._keys else self._pts[0], []).append(pts)
        for key, members in by_key.items():
            self._container.seek(min(key, members[0]), backward=True, any_frame=False, stream=self._stream)
            for frame in self._container.decode(self._stream):
                if frame.pts in members:
                    if frame.is_corrupt and not damaged:
                        raise UnsoundError("corrupt frame", f"frame {self._pts.index(frame.pts)} is corrupt")
                    found[frame.pts] = _upright(frame)
                if frame.pts is not None and frame.pts >= members[-1]:
                    break
        missing = sorted(wanted - found.keys())
        if missing:
            raise UnsoundError("missing frame", f"frame {self._pts.index(missing[0])} cannot be decoded")
        return [found[self._pts[number]] for number in numbers]


def _upright(frame: Any) -> npt.NDArray[np.uint8]:
    """A decoded frame as it is to be shown."""
    picture: npt.NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    values = np.frombuffer(bytes(matrix), dtype=np.int32).reshape(3, 3)
    corner = tuple(int(value) for value in (values[:2, :2] / _UNIT).flatten().tolist())
    if not np.array_equal(values[:2, :2] % _UNIT, np.zeros((2, 2))) or corner not in _QUARTERS:
        raise UnsoundError(
            "rotation", f"the video is to be shown turned or mirrored by {values[:2, :2].tolist()}"
        )
    return np.ascontiguousarray(np.rot90(picture, _QUARTERS[corner]))


def frame_of_stamp(stamps_us: Times, times_us: Times) -> Times:
    """Which frame belongs to each stamp of a camera's table.

    As many stamps as frames belong together in their order: then a frame that is missing is missing from
    both. With fewer stamps each takes the frame of its own time.

    Args:
        stamps_us: int64 [m], strictly ascending.
        times_us: int64 [n], the frames' own times, ascending.

    Returns:
        int64 [m], numbers of frames.

    Raises:
        UnsoundError: there are more stamps than frames, or fewer, one of them half a frame from any.
    """
    stamps, frames = len(stamps_us), len(times_us)
    if stamps == frames:
        return np.arange(stamps)
    if stamps > frames:
        raise UnsoundError("stamps", f"there are {stamps} stamps, but {frames} frames")
    half = float(np.median(np.diff(times_us))) / 2
    right = np.clip(np.searchsorted(times_us, stamps_us), 1, frames - 1)
    near = np.where(stamps_us - times_us[right - 1] <= times_us[right] - stamps_us, right - 1, right)
    off = np.abs(times_us[near] - stamps_us)
    if off.max() > half or (np.diff(near) <= 0).any():
        raise UnsoundError(
            "stamps",
            f"there are {stamps} stamps and {frames} frames, and their times differ by up to "
            f"{off.max() / 1e3:.0f} ms: which frame a stamp belongs to cannot be told",
        )
    return near
