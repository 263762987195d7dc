"""A small world on disk, read back through NVIDIA's devkit, offline."""

from __future__ import annotations

import inspect
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from physical_ai_av import PhysicalAIAVDatasetInterface

from alpamayo_dflash.clips.cache import find_snapshot
from alpamayo_dflash.clips.source import ClipError, ClipSource, iterate_windows
from alpamayo_dflash.clips.window import CAMERAS, DEFAULT_CAMERAS
from alpamayo_dflash.common.artefacts import folder_hash, read_json
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.events import sample_scene
from alpamayo_dflash.world.language import names
from alpamayo_dflash.world.read import read_facts, read_scenes
from alpamayo_dflash.world.render import draw_picture, frames
from alpamayo_dflash.world.run import run

CODEC_ERROR = 3.0  # mean absolute difference of 8-bit values that the video codec may make


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = WorldConfig(
        tmp_path_factory.mktemp("worlds") / "world", num_chunks=2, clips_per_chunk=4, seed=3, workers=2
    )
    result = run(config)
    assert result["status"] == "written" and result["clips"] == 8 and sum(result["events"].values()) == 8
    return config


@pytest.fixture(scope="module")
def scenes(world):
    return {record.clip_id: sample_scene(record.seed) for record in read_scenes(world.out)}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def difference(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - two.astype(int)).mean())


def test_windows_are_the_scenes(world, scenes, no_network):
    source = ClipSource(world.out)
    assert source.chunks() == [0, 1]
    assert source.clip_ids() == sorted(scenes)
    for clip_id, scene in scenes.items():
        window = source.window(clip_id)
        assert window.cameras == DEFAULT_CAMERAS
        assert difference(window.frames, frames(scene)) < CODEC_ERROR
        for read, made in zip(
            (window.ego_history_xyz, window.ego_history_rot, window.ego_future_xyz, window.ego_future_rot),
            (*scene.history(), *scene.future()),
            strict=True,
        ):
            assert read.dtype == np.float32 and read.shape == made.shape
            assert np.abs(read - made).max() < 1e-3, scene.facts


def test_each_timestamp_gives_its_own_frame(world, scenes):
    """No off-by-one: a frame is nearer to its own time's picture than to its neighbours'."""
    scene = max(scenes.values(), key=lambda scene: scene.track.speed[scene.track.index(0.0)])
    source = ClipSource(world.out)
    assert scene.track.pose(0.0)[0] - scene.track.pose(-0.1)[0] > 0.3
    for shift in range(-4, 2):
        window = source.window(scene.clip_id, 5_100_000 + shift * 100_000)
        for row, camera in enumerate(DEFAULT_CAMERAS):
            for column in range(4):
                time = (shift + column - 3) / 10
                errors = [
                    difference(window.frames[row, column], draw_picture(scene, camera, time + d))
                    for d in (0, -0.1, 0.1)
                ]
                assert errors[0] < CODEC_ERROR and errors[0] < min(errors[1:]), (
                    shift,
                    camera,
                    column,
                    errors,
                )


def test_between_timestamps_the_frame_before_counts(world, scenes):
    source, clip_id = ClipSource(world.out), next(iter(scenes))
    early, late = source.window(clip_id, 5_099_999), source.window(clip_id, 5_100_000)
    assert np.array_equal(early.frames[:, 1:], late.frames[:, :3])


def test_a_revision_before_26_03_asks_nothing(world, scenes, tmp_path, no_network):
    """Its table of features has another name, which the devkit would ask the hub about."""
    shutil.copytree(world.out, tmp_path / "old", symlinks=True)
    metadata = find_snapshot(tmp_path / "old") / "metadata"
    (metadata / "feature_presence.parquet").rename(metadata / "sensor_presence.parquet")
    source = ClipSource(tmp_path / "old")
    assert source.clip_ids() == sorted(scenes)
    (metadata / "sensor_presence.parquet").unlink()
    with pytest.raises(ValueError, match=r"does not hold the dataset's tables"):
        ClipSource(tmp_path / "old")


def test_the_plain_devkit_reads_it(world, scenes):
    """The documented way, without any of our code: HF_HUB_OFFLINE and the devkit's own class."""
    if "repo_id" not in inspect.signature(PhysicalAIAVDatasetInterface).parameters:
        pytest.skip("0.2.0 asks the hub, and fails where that is not to be asked")
    clip_id = min(scenes)
    code = f"""
import numpy as np
from physical_ai_av import PhysicalAIAVDatasetInterface
dataset = PhysicalAIAVDatasetInterface(revision="main", cache_dir={str(world.out)!r})
assert dataset.is_offline_mode
assert set(dataset.features.CAMERA.ALL) == set({[CAMERAS[i] for i in DEFAULT_CAMERAS]!r})
assert dataset.features.LABELS.EGOMOTION == "egomotion"
assert bool(dataset.feature_presence.all().all()) and len(dataset.clip_index) == 8
assert dataset.chunk_feature_presence.shape == (2, 5)
reader = dataset.get_clip_feature({clip_id!r}, dataset.features.CAMERA.CAMERA_FRONT_WIDE_120FOV)
images, stamps = reader.decode_images_from_timestamps(np.array([5_000_000, 5_100_000]))
assert images.shape == (2, 128, 256, 3) and stamps.tolist() == [5_000_000, 5_100_000]
assert reader.timestamps.tolist() == list(range(4_400_000, 5_300_000, 100_000))
motion = dataset.get_clip_feature({clip_id!r}, "egomotion")
assert motion.time_range[0] == 0 and motion.time_range[1] >= 11_500_000
state = motion(5_100_000)
assert state.curvature.shape == (1,)
along = state.pose.rotation.apply([1.0, 0.0, 0.0])
assert np.linalg.norm(state.velocity - along * np.linalg.norm(state.velocity)) < 1e-6
"""
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_facts_and_wordings_come_back(world, scenes):
    facts = read_facts(world.out)
    assert facts == {clip_id: scene.facts for clip_id, scene in scenes.items()}
    records = read_scenes(world.out)
    assert [record.chunk for record in records] == [0] * 4 + [1] * 4
    assert all(names(record.facts, record.coc) for record in records)


def test_a_world_is_written_once_and_always_alike(world, tmp_path):
    before = folder_hash(world.out)
    assert run(world)["status"] == "nothing to do"
    assert folder_hash(world.out) == before
    again = WorldConfig(tmp_path / "again", num_chunks=2, clips_per_chunk=4, seed=3, workers=1)
    assert run(again)["status"] == "written"
    folder = "datasets--nvidia--PhysicalAI-Autonomous-Vehicles"
    assert folder_hash(again.out / folder) == folder_hash(world.out / folder)


def test_an_interrupted_world_is_finished(world, tmp_path):
    out = tmp_path / "world"
    shutil.copytree(world.out, out)
    whole = folder_hash(out / "datasets--nvidia--PhysicalAI-Autonomous-Vehicles")
    manifest = read_json(out / "world.json")
    manifest["complete"] = False
    (out / "world.json").write_text(
        str(manifest).replace("'", '"').replace("False", "false").replace("None", "null")
    )
    snapshot = find_snapshot(out)
    (snapshot.parent.parent / "refs" / "main").unlink()
    next((snapshot / "camera").rglob("*chunk_0001.zip")).unlink()
    with pytest.raises(ValueError, match="no revision 'main'"):
        ClipSource(out)
    config = WorldConfig(out, num_chunks=2, clips_per_chunk=4, seed=3, workers=1)
    assert run(config)["status"] == "written"
    assert folder_hash(out / "datasets--nvidia--PhysicalAI-Autonomous-Vehicles") == whole


def test_another_world_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="holds another world"):
        run(WorldConfig(world.out, num_chunks=2, clips_per_chunk=4, seed=4))
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is no world"):
        run(WorldConfig(tmp_path, num_chunks=1))
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_wrong_clips_chunks_and_times_are_named(world, scenes):
    source, clip_id = ClipSource(world.out), min(scenes)
    assert source.clip_ids([1]) == sorted(c for c in scenes if source.chunk_of(c) == 1)
    for call in (source.window, source.chunk_of):
        with pytest.raises(ClipError, match="clip nowhere: unknown"):
            call("nowhere")
    with pytest.raises(ValueError, match=r"chunks \[5\] .* holds 0-1"):
        source.clip_ids([1, 5])
    with pytest.raises(ValueError, match="list of clips is empty"):
        source.clip_ids([])
    with pytest.raises(ValueError, match="list of clips is empty"):
        iterate_windows(source, [])
    for t0_us in (4_000_000, 9_000_000, 100):
        with pytest.raises(ClipError, match=f"clip {clip_id}: .*timestamps"):
            source.window(clip_id, t0_us)


def test_a_clip_that_ends_early_has_no_future(world, scenes, monkeypatch):
    source, clip_id = ClipSource(world.out), min(scenes)
    monkeypatch.setattr(ClipSource, "_frames", lambda *_: np.zeros((4, 8, 8, 3), np.uint8))
    assert source.window(clip_id, 5_300_000).ego_future_xyz is not None
    late = source.window(clip_id, 5_400_000)
    assert late.ego_future_xyz is None and late.ego_future_rot is None
    assert late.ego_history_xyz.shape == (16, 3)
    with pytest.raises(ClipError, match=r"needs 1\.5 s of history"):
        source.window(clip_id, 1_400_000)


def damage(world: Path, feature: str, clip_id: str, member: str, content: bytes | None) -> None:
    """Replace one member of one clip in a zip, or leave it out."""
    for path in find_snapshot(world).rglob(f"{feature}.chunk_*.zip"):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = f"{clip_id}.{feature}.{member}"
        if name not in members:
            continue
        del members[name]
        with zipfile.ZipFile(path, "w") as archive:
            for other, data in members.items():
                archive.writestr(other, data)
            if content is not None:
                archive.writestr(name, content)


@pytest.mark.parametrize("kind", ["garbage", "truncated", "empty", "missing"])
def test_a_corrupt_video_is_named_and_the_others_are_read(world, scenes, tmp_path, kind):
    out, (bad, *good) = tmp_path / "world", sorted(scenes)
    shutil.copytree(world.out, out)
    feature = "camera_front_wide_120fov"
    archive = next(find_snapshot(out).rglob(f"{feature}.chunk_{ClipSource(out).chunk_of(bad):04d}.zip"))
    video = zipfile.ZipFile(archive).read(f"{bad}.{feature}.mp4")
    content = {
        "garbage": b"\x17" * 4096,
        "truncated": video[: len(video) // 2],
        "empty": b"",
        "missing": None,
    }
    damage(out, feature, bad, "mp4", content[kind])
    results = dict(iterate_windows(ClipSource(out), [bad, *good], workers=2))
    assert list(results) == [bad, *good]
    error = results.pop(bad)
    assert isinstance(error, ClipError) and error.clip_id == bad
    assert f"{feature}.chunk_" in str(error) and f"clip {bad}: cannot read {feature}" in str(error)
    assert all(not isinstance(window, ClipError) for window in results.values())


def test_damaged_motion_and_archives_are_named(world, scenes, tmp_path):
    out, clip_id = tmp_path / "world", min(scenes)
    shutil.copytree(world.out, out)
    damage(out, "egomotion", clip_id, "parquet", b"PAR1 not really")
    with pytest.raises(ClipError, match="cannot read egomotion"):
        ClipSource(out).window(clip_id)
    for path in find_snapshot(out).rglob("camera_cross_left_120fov.chunk_*.zip"):
        path.write_bytes(b"no archive")
    with pytest.raises(ClipError, match="BadZipFile"):
        ClipSource(out).window(max(scenes))
    for path in find_snapshot(out).rglob("camera_cross_left_120fov.chunk_0001.zip"):
        path.unlink()
    assert ClipSource(out).chunks() == [0]
    assert ClipSource(out, cameras=(1,)).chunks() == [0, 1]


def test_reading_ahead_keeps_the_order_and_stops_when_left(world, scenes):
    source, ids = ClipSource(world.out), sorted(scenes, reverse=True)
    assert [clip_id for clip_id, _ in iterate_windows(source, ids, workers=3)] == ids
    some = iterate_windows(source, ids, workers=1)
    assert next(some)[0] == ids[0]
    some.close()
