"""Fetching chunks: a stand-in for the hub serves a small world's files, and the devkit does the rest."""

import json
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from huggingface_hub.errors import HfHubHTTPError

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.clips.cache import find_snapshot, repo_folder
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run
from tests.helpers.hub import Hub


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = WorldConfig(
        tmp_path_factory.mktemp("worlds") / "world", num_chunks=2, clips_per_chunk=2, seed=3, workers=1
    )
    run(config)
    return config.out


# The base that the errors of the hub's library share with its HTTP client: requests', httpx's or httpx2's.
HTTP_ERROR = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@pytest.fixture
def hub(world: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    served = Hub(world)
    served.install(monkeypatch)
    return served


def clips(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    status = main(["clips", *map(str, arguments)])
    out, said = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if out.strip() else {}, said


def test_a_chunk_is_fetched_read_offline_and_not_fetched_again(
    hub: Hub, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--cache-dir", tmp_path / "cache", "--prefetch", "--chunks", 1)
    status, found, _ = clips(capsys, *wanted)
    assert status == 0
    assert found["prefetch"] | {"size_bytes": 0} == {
        "attempted": 1,
        "already": 0,
        "done": 1,
        "failed": 0,
        "reasons": {},
        "size_bytes": 0,
        "revision": hub.main,
        "main": hub.main,
    }
    assert not any("chunk_0000" in name for name in hub.asked)
    files = list((tmp_path / "cache").rglob("*chunk_0001.zip"))
    assert found["prefetch"]["size_bytes"] == sum(file.stat().st_size for file in files) > 0
    source, there = ClipSource(tmp_path / "cache"), ClipSource(world)
    assert source.chunks() == [1]
    clip_id = found["clip_ids"][0]
    assert (source.window(clip_id).frames == there.window(clip_id).frames).all()
    hub.asked.clear()
    status, found, said = clips(capsys, *wanted)
    assert (status, found["prefetch"]["already"], found["nothing_to_do"]) == (0, 1, True)
    assert "nothing to do" in said
    assert hub.asked == []


def test_a_chunk_that_fails_is_recorded_and_the_next_call_goes_on(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.broken = {"egomotion.chunk_0000": OSError("connection lost")}
    wanted = ("--cache-dir", tmp_path / "cache", "--prefetch", "--num-chunks", 2)
    status, found, _ = clips(capsys, *wanted)
    assert status == 1
    assert (found["prefetch"]["done"], found["prefetch"]["failed"]) == (1, 1)
    assert "connection lost" in found["prefetch"]["reasons"]["0"]
    assert list(found["chunks"]) == ["1"]
    hub.broken.clear()
    hub.asked.clear()
    status, found, _ = clips(capsys, *wanted)
    assert status == 0
    assert (found["prefetch"]["already"], found["prefetch"]["done"]) == (1, 1)
    assert not any("chunk_0001" in name for name in hub.asked)
    assert list(found["chunks"]) == ["0", "1"]


def test_fewer_cameras_fetch_fewer_files(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, _ = clips(capsys, "--cache-dir", tmp_path / "c", "--prefetch", "--chunks", 0, "--cameras", "1")
    assert status == 0
    assert len([name for name in hub.asked if name.endswith(".zip")]) == 2
    assert ClipSource(tmp_path / "c", cameras=(1,)).chunks() == [0]
    assert ClipSource(tmp_path / "c").chunks() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prefetch",), "prefetch needs chunks"),
        (("--prefetch", "--chunks", "0", "--num-chunks", "1"), "say the same"),
        (("--prefetch", "--chunks", "7"), "chunks [7] are not in the dataset"),
        (
            ("--prefetch", "--chunks", "0", "--clip-ids", "list.json"),
            "chunks 0 and clip_ids list.json say the same",
        ),
        (("--prefetch", "--clip-ids", "none.json"), "none.json: no such file"),
        (("--prefetch", "--chunks", "0", "--cameras", "9"), "cameras (9,): should be different ones of"),
        (("--prefetch", "--chunks", "0", "--cameras", "1,1"), "cameras (1, 1): should be different ones of"),
        (("--prefetch", "--chunks", "0", "--cameras", "0-2"), "'0-2' is no list of cameras"),
        (
            ("--prefetch", "--chunks", "0", "--cameras", "0,5"),
            "has no camera_rear_right_70fov; it has camera_",
        ),
        (("--prefetch", "--chunks", "0", "--workers", "0"), "workers is 0"),
        (("--prefetch", "--chunks", "x"), "no list of chunks"),
    ],
)
def test_bad_options_are_named(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    try:
        status = main(["clips", "--cache-dir", str(tmp_path / "cache"), *arguments])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    assert status == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.rglob("*.zip"))


def test_without_the_hub_the_reason_is_said(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (OSError("no route"), HTTP_ERROR("no route"), RuntimeError("no route")):
        hub.broken = {"": error}
        status, _, said = clips(capsys, "--cache-dir", tmp_path / "cache", "--prefetch", "--chunks", 0)
        assert status == 2
        assert f"{type(error).__name__}: no route" in said
        assert "accept its terms" in said


def test_cameras_that_the_dataset_lacks_are_named_from_the_cache_too(
    hub: Hub, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = clips(capsys, "--cache-dir", world, "--prefetch", "--chunks", 0, "--cameras", "0,5")
    assert status == 2
    assert "has no camera_rear_right_70fov; it has camera_cross_left_120fov" in said
    assert hub.asked == []


def test_reasons_say_what_happened(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = FileNotFoundError("An error happened\n\nwhile trying")
    refused.__cause__ = PermissionError("403 Forbidden: no access to this repository")
    hub.broken = {
        "egomotion.chunk_0000": refused,
        "camera_front_wide_120fov.chunk_0000": HTTP_ERROR("the read timed out"),
    }
    absent = "labels/egomotion/egomotion.chunk_0001.zip"
    hub.lacking = {absent}
    status, found, _ = clips(capsys, "--cache-dir", tmp_path / "c", "--prefetch", "--chunks", "0,1")
    assert status == 1
    assert found["prefetch"]["failed"] == found["prefetch"]["attempted"] == 2
    reasons = found["prefetch"]["reasons"]
    assert reasons["0"] == (
        "HTTPError: the read timed out; FileNotFoundError: An error happened while trying "
        "from PermissionError: 403 Forbidden: no access to this repository"
    )
    assert f"{absent!r} not found in" in reasons["1"]
    assert "KeyError" not in reasons["1"]


def test_a_revision_by_hash_is_what_the_later_steps_read(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--cache-dir", tmp_path / "c", "--prefetch", "--chunks", 0, "--revision")
    status, found, said = clips(capsys, *wanted, hub.main)
    assert (status, found["prefetch"]["revision"], found["prefetch"]["main"]) == (0, hub.main, hub.main)
    assert ClipSource(tmp_path / "c").chunks() == [0]
    assert "later steps" not in said
    other = "f" * 40
    status, found, said = clips(capsys, *wanted, other)
    assert (status, found["prefetch"]["revision"], found["prefetch"]["main"]) == (0, other, hub.main)
    assert f"fetched revision {other}, but this cache's `main`, which the later steps read" in said
    assert find_snapshot(tmp_path / "c").name == hub.main


def test_a_fetch_goes_on_at_the_commit_it_began_with(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = hub.main
    assert clips(capsys, "--cache-dir", tmp_path / "c", "--prefetch", "--chunks", 0)[0] == 0
    hub.main = "e" * 40
    hub.asked.clear()
    status, found, _ = clips(capsys, "--cache-dir", tmp_path / "c", "--prefetch", "--chunks", "0,1")
    assert (status, found["prefetch"]["already"], found["prefetch"]["revision"]) == (0, 1, began)
    assert find_snapshot(tmp_path / "c").name == began
    assert all("chunk_0001" in name for name in hub.asked)


def test_a_branch_that_moves_during_the_first_fetch_does_not_mix_two_commits(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = hub.main

    def move(name: str) -> None:
        hub.main = "d" * 40 if name.endswith(".zip") else began

    hub.at_work = move
    assert clips(capsys, "--cache-dir", tmp_path / "c", "--prefetch", "--chunks", 0)[0] == 0
    assert [each.name for each in (repo_folder(tmp_path / "c") / "snapshots").iterdir()] == [began]


def test_workers_fetch_files_of_several_chunks_at_a_time(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = 2 * 5  # two chunks' four cameras and ego motion
    together = threading.Barrier(files, timeout=20)

    def all_at_once(name: str) -> None:
        if name.endswith(".zip"):
            together.wait()

    hub.at_work = all_at_once
    wanted = ("--prefetch", "--chunks", "0,1", "--workers")
    assert clips(capsys, "--cache-dir", tmp_path / "ten", *wanted, files)[0] == 0

    slots = threading.BoundedSemaphore(2)

    def within_two(name: str) -> None:
        assert slots.acquire(blocking=False), f"{name} is a third at a time"
        threading.Event().wait(0.01)
        slots.release()

    hub.at_work = within_two
    assert clips(capsys, "--cache-dir", tmp_path / "two", *wanted, 2)[0] == 0


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_clip_list_fetches_the_chunks_it_lies_in(
    hub: Hub, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    clip_id = ClipSource(world).clip_ids([1])[0]
    file = tmp_path / f"list{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps([clip_id]))
    else:
        pd.DataFrame({"clip_id": [clip_id]}).to_parquet(file)
    wanted = ("--cache-dir", tmp_path / "c", "--clip-ids", file)
    status, found, _ = clips(capsys, *wanted, "--prefetch")
    assert status == 0
    assert (found["clip_ids"], found["chunks"], found["prefetch"]["done"]) == ([clip_id], {"1": 1}, 1)
    assert not any("chunk_0000" in name for name in hub.asked)
    assert clips(capsys, *wanted)[1] == {"clips": 1, "chunks": {"1": 1}, "clip_ids": [clip_id]}


def test_a_clip_list_with_strangers_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text('["nobody"]')
    wanted = ("--cache-dir", tmp_path / "c", "--prefetch", "--clip-ids", tmp_path / "list.json")
    status, _, said = clips(capsys, *wanted)
    assert status == 2
    assert "1 clips are not in the dataset" in said
    assert "such as nobody" in said
