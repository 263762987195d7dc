"""A stand-in for the hub, which serves a small world's files."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.hf_api import RepoFile

from alpamayo_dflash.clips.cache import find_snapshot, repo_folder


class Hub:
    """Serves a snapshot's files as the hub's library would, and counts what it is asked for."""

    def __init__(self, world: Path) -> None:
        self.snapshot = find_snapshot(world)
        self.main = self.snapshot.name
        self.broken: dict[str, Exception] = {}
        self.lacking: set[str] = set()
        self.asked: list[str] = []
        self.at_work: Callable[[str], None] = lambda name: None

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
            if (self.snapshot / name).is_file() and name not in self.lacking
        ]

    def download(self, filename: str, cache_dir: Path, revision: str, **_: Any) -> str:
        folder = repo_folder(cache_dir)
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else self.main
        target = folder / "snapshots" / commit / filename
        if target.is_file():
            return str(target)
        self.asked.append(filename)
        self.at_work(filename)
        for part, error in self.broken.items():
            if part in filename:
                raise error
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.snapshot / filename, target)
        if revision != commit:
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / revision).write_text(commit)
        return str(target)
