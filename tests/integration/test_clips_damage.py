"""Clips whose files are not what they should be: the moment's own frames and poses, or a refusal."""

from __future__ import annotations

import fractions
import io
import json
import shutil
import struct
import zipfile

import numpy as np
import pandas as pd
import pytest

from alpamayo_dflash.clips.cache import find_snapshot
from alpamayo_dflash.clips.source import ClipError, ClipSource, iterate_windows
from alpamayo_dflash.clips.video import UnsoundError, Video, frame_of_stamp
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run

FRONT = "camera_front_wide_120fov"
RATE, COUNT, T0 = 30, 180, 5_100_000
STAMPS = np.round(np.arange(COUNT) * 1e6 / RATE).astype(np.int64)
RIGHT = [144, 147, 150, 153]  # of t0 − 0.3 s … t0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("worlds") / "world"
    run(WorldConfig(out, num_chunks=1, clips_per_chunk=2, seed=5, workers=1))
    return out


@pytest.fixture
def damaged(world, tmp_path):
    """A copy of the world to damage."""
    return shutil.copytree(world, tmp_path / "world")


def rezip(world, feature, change):
    """Change the members of chunk 0 of a feature: {name: bytes} in place."""
    group = "labels" if feature == "egomotion" else "camera"
    path = find_snapshot(world) / group / feature / f"{feature}.chunk_0000.zip"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def parquet(**columns):
    file = io.BytesIO()
    pd.DataFrame(columns).to_parquet(file)
    return file.getvalue()


def first_clip(world):
    return ClipSource(world).clip_ids()[0]


def picture(number):
    """A frame's number as ten black or white bars."""
    bars = [255 * (number >> bit & 1) for bit in range(10)]
    return np.repeat(np.repeat(np.uint8(bars), 16)[None, :, None], 64, 0).repeat(3, 2)


def number_of(frame):
    return sum(int(frame[32, 16 * bit + 8, 0] > 128) << bit for bit in range(10))


def video(numbers, times=None, *, gop=30, b_frames=0, first=0):
    """An MP4 of numbered frames; `times` are theirs in 1/30 s."""
    import av

    options = {"preset": "ultrafast", "bf": str(b_frames)}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 160, 64, "yuv420p", gop
        for index, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = first + (index if times is None else times[index])
            frame.time_base = fractions.Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def read(world, mp4, stamps, **options):
    """The numbers of the frames of t0 when the front camera's files are these."""
    clip = first_clip(world)
    names = f"{clip}.{FRONT}.mp4", f"{clip}.{FRONT}.timestamps.parquet"
    rezip(
        world,
        FRONT,
        lambda members: members.update(zip(names, (mp4, parquet(timestamp=stamps)), strict=True)),
    )
    source = ClipSource(world, cameras=[1], **options)
    return [number_of(frame) for frame in source.window(clip, T0).frames[0]], source.noted


EVERY, LOST = range(COUNT), [number for number in range(COUNT) if number != 100]
SOUND = {
    "plain": (video(EVERY), STAMPS),
    "every frame a key frame": (video(EVERY, gop=1), STAMPS),
    "one key frame, B-frames": (video(EVERY, gop=999, b_frames=3), STAMPS),
    "the first frame is not at 0": (video(EVERY, first=77), STAMPS),
    "a frame missing from both": (video(LOST, LOST), STAMPS[LOST]),
    "a frame missing from both, times closed up": (video(LOST), STAMPS[LOST]),
    "times of another rate": (video(EVERY, [2 * number for number in EVERY]), STAMPS),
    "stamps on another clock": (video(EVERY, first=500), STAMPS),
}


@pytest.mark.parametrize("case", SOUND)
def test_as_many_stamps_as_frames_belong_together_in_order(damaged, case):
    assert read(damaged, *SOUND[case]) == (RIGHT, {})


@pytest.mark.parametrize(("case", "kept"), [("end", slice(0, -9)), ("beginning", slice(10, None))])
def test_stamps_lost_at_an_end_leave_each_its_own_frame(damaged, case, kept, capsys):
    found, noted = read(damaged, video(EVERY), STAMPS[kept])
    assert found == RIGHT, case
    assert noted == {"fewer stamps": 1}
    assert f"{FRONT}: {len(STAMPS[kept])} stamps, {COUNT} frames" in capsys.readouterr().err


def test_a_stamp_lost_in_the_middle_leaves_each_its_own_frame(damaged):
    assert read(damaged, video(EVERY), np.delete(STAMPS, 60))[0] == RIGHT


UNSOUND = {
    "more stamps than frames": (video(LOST, LOST), STAMPS, "180 stamps, but 179 frames"),
    "frames lost at the beginning": (video(range(10, COUNT)), STAMPS, "180 stamps, but 170 frames"),
    "fewer stamps on another clock": (video(EVERY, first=77), STAMPS[:-9], "cannot be told"),
    "a stamp twice": (video(EVERY), np.where(np.arange(COUNT) == 9, STAMPS[8], STAMPS), "and ascend"),
    "stamps that fall": (video(EVERY), STAMPS[::-1].copy(), "and ascend"),
    "one stamp": (video(EVERY), STAMPS[:1], "at least two"),
    "no stamps": (video(EVERY), STAMPS[:0], "at least two"),
    "nanoseconds": (video(EVERY), STAMPS * 1000, "no frame for"),
    "datetimes": (video(EVERY), pd.to_datetime(STAMPS, unit="us"), "whole microseconds"),
    "fractions": (video(EVERY), STAMPS + 0.5, "whole microseconds"),
    "no video": (b"", STAMPS, "cannot read"),
    "a cut video": (video(EVERY)[:400], STAMPS, "cannot read"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_other_stamps_and_frames_are_refused_by_name(damaged, case):
    mp4, stamps, message = UNSOUND[case]
    with pytest.raises(ClipError, match=message) as caught:
        read(damaged, mp4, stamps)
    assert first_clip(damaged) in str(caught.value) and FRONT in str(caught.value)
    assert caught.value.kind in ("stamps", "moment", "file")


def test_warn_reads_by_order_and_says_so(damaged, capsys):
    found, noted = read(damaged, video(EVERY, first=77), STAMPS[:-9], frames="warn")
    assert (found, noted) == (RIGHT, {"stamps": 1})
    assert "read by their order" in capsys.readouterr().err
    with pytest.raises(ClipError, match="180 stamps, but 179 frames"):
        read(damaged, video(LOST, LOST), STAMPS, frames="warn")


@pytest.mark.parametrize(("matrix", "turns"), [((-1, 0, 0, -1), 2), ((0, 1, -1, 0), 3), ((0, -1, 1, 0), 1)])
def test_a_turned_video_is_turned(matrix, turns):
    upright = Video(video(range(8)))
    turned = Video(rotated(video(range(8)), matrix))
    assert np.array_equal(turned.frames([5])[0], np.rot90(upright.frames([5])[0], turns))


def rotated(mp4, matrix):
    """The video with another matrix in its track header."""
    at = mp4.index(b"tkhd") + 44
    a, b, c, d = (value * 65536 for value in matrix)
    return mp4[:at] + struct.pack(">9i", int(a), int(b), 0, int(c), int(d), 0, 0, 0, 1 << 30) + mp4[at + 36 :]


@pytest.mark.parametrize("matrix", [(1, 0, 0, -1), (0.5, 0.5, -0.5, 0.5)])
def test_a_mirrored_or_tilted_video_is_refused(matrix):
    with pytest.raises(UnsoundError, match="turned or mirrored") as caught:
        Video(rotated(video(range(8)), matrix)).frames([5])
    assert caught.value.kind == "rotation"


def test_frames_of_stamps_are_those_of_a_search():
    """Against the plain search, on random subsets with jitter of less than half a frame."""
    random = np.random.default_rng(1)
    times = np.arange(50, dtype=np.int64) * 33_333
    for count in range(1, 50):
        kept = np.sort(random.choice(50, count, replace=False))
        stamps = times[kept] + random.integers(-16_000, 16_000, count)
        assert frame_of_stamp(stamps, times).tolist() == kept.tolist()


def motion(world, change):
    """The window after a change of the first clip's table of ego motion."""
    clip = first_clip(world)
    name = f"{clip}.egomotion.parquet"

    def apply(members):
        file = io.BytesIO()
        change(pd.read_parquet(io.BytesIO(members[name]))).to_parquet(file)
        members[name] = file.getvalue()

    rezip(world, "egomotion", apply)
    return ClipSource(world).window(clip)


GAP = "ms without a pose around"
MOTIONS = {
    "four seconds lost": (
        lambda d: d[(d.timestamp < T0 - 2_000_000) | (d.timestamp > T0 + 2_000_000)],
        GAP,
    ),
    "two rows": (lambda d: d.iloc[[0, -1]], GAP),
    "a gap in the future alone": (lambda d: d[(d.timestamp < T0 + 3e6) | (d.timestamp > T0 + 3.5e6)], GAP),
    "nanoseconds": (lambda d: d.assign(timestamp=d.timestamp * 1000), GAP),
    "datetimes": (lambda d: d.assign(timestamp=pd.to_datetime(d.timestamp, unit="us")), "whole microsec"),
    "not ascending": (lambda d: d.iloc[::-1], "ascend"),
    "no rows": (lambda d: d.iloc[:0], "at least two"),
    "one row": (lambda d: d.iloc[:1], "at least two"),
    "NaN": (lambda d: d.assign(x=np.where(d.timestamp.abs() >= 0, np.nan, d.x)), "(?i)finite|nan|egomotion"),
    "no such column": (lambda d: d.drop(columns="qx"), "cannot read"),
    "no stamps": (lambda d: d.drop(columns="timestamp"), "cannot read"),
    "a text": (lambda d: d.assign(x="east"), "cannot read"),
}


@pytest.mark.parametrize("case", MOTIONS)
def test_motion_that_was_not_recorded_is_not_invented(damaged, case):
    change, message = MOTIONS[case]
    with pytest.raises(ClipError, match=message) as caught:
        motion(damaged, change)
    assert first_clip(damaged) in str(caught.value)
    [(_, window), _] = iterate_windows(ClipSource(damaged), ClipSource(damaged).clip_ids())
    assert isinstance(window, ClipError)  # and the run goes on


def test_a_gap_that_no_moment_needs_is_none(damaged):
    sound = ClipSource(damaged).window(first_clip(damaged))
    early = motion(damaged, lambda d: d[(d.timestamp < 2_000_000) | (d.timestamp > 3_000_000)])
    assert np.abs(early.ego_history_xyz - sound.ego_history_xyz).max() < 0.01
    motion(damaged, lambda d: d[(d.timestamp < 5_000_000) | (d.timestamp > 5_050_000)])
    assert ClipSource(damaged, motion_gap_ms=150).window(first_clip(damaged)).key
    with pytest.raises(ClipError, match="at most 20 are bridged"):
        ClipSource(damaged, motion_gap_ms=20).window(first_clip(damaged))


def test_an_older_revision_asks_no_network(damaged, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tables = find_snapshot(damaged) / "metadata"
    (tables / "feature_presence.parquet").rename(tables / "sensor_presence.parquet")
    assert len(ClipSource(damaged).clip_ids()) == 2
    (tables / "sensor_presence.parquet").unlink()
    with pytest.raises(ValueError, match="dataset's tables"):
        ClipSource(damaged)


def test_what_keeps_a_chunk_from_being_read_is_named(damaged, tmp_path):
    with pytest.raises(ValueError, match=r"list of clips is empty.*chunk 0 lacks camera/camera_rear_left"):
        ClipSource(damaged, cameras=[0, 3]).clip_ids()
    snapshot = find_snapshot(damaged)
    shutil.copytree(snapshot, tmp_path / "plain")
    with pytest.raises(ValueError, match="holds the dataset's files as they are"):
        ClipSource(tmp_path / "plain")
    next((snapshot / "camera" / "camera_front_tele_30fov").iterdir()).unlink()
    for chunks in (None, [0]):
        with pytest.raises(ValueError, match=r"chunk 0 lacks camera/camera_front_tele_30fov/.*zip"):
            ClipSource(damaged).clip_ids(chunks)


def test_a_moment_is_a_whole_number_of_microseconds(world):
    source, clip = ClipSource(world), first_clip(world)
    whole = source.window(clip, T0)
    for same in (5.1e6, np.int64(T0), np.float64(T0)):
        window = source.window(clip, same)
        assert window.key == whole.key == f"{clip}@5100000"
        assert type(window.t0_us) is int
        assert (
            Window(clip, same, (), whole.frames, *(whole.ego_history_xyz, whole.ego_history_rot)).key
            == whole.key
        )
    for wrong in (5.1e6 + 0.5, float("nan"), float("inf"), "5100000", None):
        with pytest.raises(ValueError, match="whole number of microseconds"):
            source.window(clip, wrong)


def test_errors_survive_a_process(world):
    import pickle

    error = pickle.loads(pickle.dumps(ClipError("a", "b", "stamps")))
    assert (error.clip_id, error.reason, error.kind) == ("a", "b", "stamps")
    assert json.dumps(error.reason) == '"b"'


@pytest.mark.parametrize("stage", ["distill", "layers"])
def test_failed_clips_are_tried_again_after_repair(damaged, tmp_path, capsys, stage):
    """Once a file of theirs has changed, and not before; all failed is no success."""
    from alpamayo_dflash.cli.main import main

    kept = {}

    def cut(members):
        kept.update(members)
        members.update({name: data[:200] for name, data in members.items() if name.endswith("mp4")})

    more = {
        "distill": ["--target-layers", "1,3", "--samples-per-clip", "1"],
        "layers": ["--num-target-layers", "2"],
    }
    words = [
        stage,
        "--model-path",
        "tiny",
        "--cache-dir",
        str(damaged),
        "--output-dir",
        str(tmp_path / "out"),
    ]

    def run_stage(*flags):
        status = main([*words, *more[stage], "--max-tokens", "4", *flags])
        out = capsys.readouterr().out
        return status, json.loads(out.splitlines()[-1]) if out else {}

    rezip(damaged, FRONT, cut)
    status, said = run_stage()
    assert status == (1 if stage == "distill" else 2)
    if stage == "distill":
        assert said["clips"] == {"attempted": 2, "done": 0, "failed": 2}
        assert said["failure_kinds"] == {"file": 2}
        status, said = run_stage()
        assert status == 1 and said["nothing_to_do"]
        assert run_stage("--retry-failed")[1]["nothing_to_do"] is False
    rezip(damaged, FRONT, lambda members: members.update(kept))
    status, said = run_stage()
    assert status == 0
    assert said["clips"] == {"attempted": 2, "done": 2, "failed": 0}
    assert run_stage()[1]["nothing_to_do"]
