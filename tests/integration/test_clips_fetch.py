"""Fetching chunks: a stand-in for the hub serves a small world's files, and the devkit does the rest."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.hf_api import RepoFile

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.clips import ClipSource
from alpamayo_dflash.clips.cache import find_snapshot, repo_folder
from alpamayo_dflash.world import WorldConfig
from alpamayo_dflash.world.run import run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = WorldConfig(
        tmp_path_factory.mktemp("worlds") / "world", num_chunks=2, clips_per_chunk=2, seed=3, workers=1
    )
    run(config)
    return config.out


class Hub:
    """Serves a snapshot's files as the hub's library would, and counts what it is asked for."""

    def __init__(self, world: Path) -> None:
        self.snapshot = find_snapshot(world)
        self.broken: set[str] = set()
        self.asked: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        api = huggingface_hub.HfApi
        monkeypatch.setattr(
            api, "file_exists", lambda _, filename, **__: (self.snapshot / filename).is_file()
        )
        monkeypatch.setattr(api, "get_paths_info", lambda _, paths, **__: self.paths_info(paths))
        monkeypatch.setattr(api, "hf_hub_download", lambda _, **options: self.download(**options))

    def paths_info(self, paths: list[str] | str) -> list[RepoFile]:
        names = [paths] if isinstance(paths, str) else paths
        return [
            RepoFile(path=name, size=(self.snapshot / name).stat().st_size, oid="0" * 40)
            for name in names
            if (self.snapshot / name).is_file()
        ]

    def download(self, filename: str, cache_dir: Path, **_: Any) -> str:
        folder = repo_folder(cache_dir)
        target = folder / "snapshots" / self.snapshot.name / filename
        if target.is_file():
            return str(target)
        self.asked.append(filename)
        if any(part in filename for part in self.broken):
            raise OSError(f"connection lost at {filename}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.snapshot / filename, target)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(self.snapshot.name)
        return str(target)


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
    hub.broken = {"egomotion.chunk_0000"}
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
        (("--prefetch", "--chunks", "0", "--cameras", "9"), "camera 9 is unknown"),
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
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.broken = {""}
    status, _, said = clips(capsys, "--cache-dir", tmp_path / "cache", "--prefetch", "--chunks", 0)
    assert status == 2
    assert "accept its terms" in said
