"""Writing a chunk of scenes in the layout that the devkit `physical_ai_av` reads from a hub cache.

A video holds only the frames around the default t0: from t0 - 0.7 s to t0 + 0.1 s at 10 Hz. The ego motion
covers the clip from its start to t0 + 6.6 s, in a frame of the clip's own, tilted and far from the ego.
"""

from __future__ import annotations

import fractions
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from alpamayo_dflash.clips.cache import EGOMOTION, chunk_file
from alpamayo_dflash.clips.config import DEFAULT_T0_US
from alpamayo_dflash.clips.window import CAMERAS, DEFAULT_CAMERAS, STEP_S, STEP_US
from alpamayo_dflash.common.artefacts import atomic_file
from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.world.events import sample_scene
from alpamayo_dflash.world.render import draw_picture
from alpamayo_dflash.world.scene import Scene, scene_seed

with needs("clips"):
    from PIL import Image
    from scipy.spatial.transform import Rotation

FEATURES = (*(CAMERAS[index] for index in DEFAULT_CAMERAS), EGOMOTION)
VIDEO_STEPS = range(-7, 2)  # frames, in tenths of a second after t0
_FRAME_RATE = 10
_MOTION_STRIDE = 2  # every 40 ms of the track's 20 ms
_MOTION_SPAN_S = (-DEFAULT_T0_US / 1e6, 6.64)
_STILL = (2000, 1, 1, 0, 0, 0)  # zip members carry a fixed date, so that equal clips give equal files


def zip_members(feature: str) -> dict[str, str]:
    """The names of a clip's files in a feature's zip, by the devkit's aliases."""
    if feature == EGOMOTION:
        return {EGOMOTION: f"{{clip_id}}.{EGOMOTION}.parquet"}
    return {
        "video": f"{{clip_id}}.{feature}.mp4",
        "frame_timestamps": f"{{clip_id}}.{feature}.timestamps.parquet",
    }


def write_chunk(
    snapshot: Path, world_seed: int, chunk: int, clips: int, size: tuple[int, int] | None = None
) -> None:
    """Write the files of one chunk that are not there yet; each appears whole or not at all.

    Args:
        snapshot: the snapshot's folder.
        world_seed: the world's seed.
        chunk: the chunk's number.
        clips: clips in the chunk.
        size: height and width that the pictures are enlarged to; None leaves them as they are drawn.
    """
    missing = [feature for feature in FEATURES if not (snapshot / chunk_file(feature, chunk)).is_file()]
    members: dict[str, dict[str, bytes]] = {feature: {} for feature in missing}
    for index in range(clips) if missing else ():
        scene = sample_scene(scene_seed(world_seed, chunk, index))
        for feature in missing:
            members[feature].update(_clip_files(scene, feature, size))
    for feature in missing:
        _write_zip(snapshot / chunk_file(feature, chunk), members[feature])


def _clip_files(scene: Scene, feature: str, size: tuple[int, int] | None) -> dict[str, bytes]:
    """The zip members of one clip and feature: name to content."""
    names = {alias: name.format(clip_id=scene.clip_id) for alias, name in zip_members(feature).items()}
    if feature == EGOMOTION:
        return {names[EGOMOTION]: _parquet(motion_columns(scene))}
    camera = next(index for index in DEFAULT_CAMERAS if CAMERAS[index] == feature)
    pictures = np.stack([_enlarged(draw_picture(scene, camera, step * STEP_S), size) for step in VIDEO_STEPS])
    stamps = DEFAULT_T0_US + np.array(VIDEO_STEPS, np.int64) * STEP_US
    return {
        names["video"]: encode_video(pictures),
        names["frame_timestamps"]: _parquet({"timestamp": stamps}),
    }


def _enlarged(picture: npt.NDArray[np.uint8], size: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    if size is None:
        return picture
    height, width = size
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def encode_video(pictures: npt.NDArray[np.uint8]) -> bytes:
    """Encode pictures [frames, height, width, 3] as H.264 in MP4 at 10 Hz, every frame a key frame."""
    with needs("clips"):
        import av

    stream_options = {"crf": "14", "preset": "ultrafast", "tune": "zerolatency"}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=_FRAME_RATE, options=stream_options)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size, stream.thread_count = 1, 1
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, fractions.Fraction(1, _FRAME_RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def motion_columns(scene: Scene) -> dict[str, npt.NDArray[np.generic]]:
    """The ego motion of a clip, by the dataset's columns, in the clip's own frame."""
    track = scene.track
    first, last = (track.index(time) for time in _MOTION_SPAN_S)
    rows = slice(first, last + 1, _MOTION_STRIDE)
    rng = np.random.default_rng((scene.seed, 1))
    tilt = rng.normal(0.0, 1.5, 2)
    frame = Rotation.from_euler("ZYX", [rng.uniform(-180.0, 180.0), *tilt], degrees=True)
    origin = np.append(rng.uniform(-500.0, 500.0, 2), rng.uniform(-5.0, 5.0))
    yaw, speed = track.yaw[rows], track.speed[rows]
    zero = np.zeros_like(yaw)
    place = frame.apply(np.column_stack([track.x[rows], track.y[rows], zero])) + origin
    along = np.column_stack([np.cos(yaw), np.sin(yaw), zero])
    across = np.column_stack([-np.sin(yaw), np.cos(yaw), zero])
    turning = (track.curvature[rows] * speed**2)[:, None]
    columns: dict[str, npt.NDArray[np.generic]] = {
        "timestamp": DEFAULT_T0_US + np.round(track.t[rows] * 1e6).astype(np.int64)
    }
    vectors = {
        ("qx", "qy", "qz", "qw"): (frame * Rotation.from_euler("z", yaw[:, None])).as_quat(),
        ("x", "y", "z"): place,
        ("vx", "vy", "vz"): frame.apply(along * speed[:, None]),
        ("ax", "ay", "az"): frame.apply(along * track.acceleration[rows][:, None] + across * turning),
    }
    for names, values in vectors.items():
        columns |= {name: values[:, i] for i, name in enumerate(names)}
    columns["curvature"] = track.curvature[rows]
    return columns


def _parquet(columns: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    with needs("clips"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), file)
    return file.getvalue()


def _write_zip(path: Path, members: Mapping[str, bytes]) -> None:
    """Write a zip of stored members: their content is compressed already."""
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, _STILL), content)
