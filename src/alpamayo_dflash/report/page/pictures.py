"""The frames of a page's clips: in its file, or beside it where they are many."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from alpamayo_dflash.common.artefacts import atomic_folder, recover_folder
from alpamayo_dflash.report.clip_trace import Frame, frame_bytes

MOST_EMBEDDED = 60
"""Clips whose frames are in the page's file; of more, `FEW_EMBEDDED` are, and the others lie beside it."""
FEW_EMBEDDED = 24


class Pictures:
    """The frames of all clips, each picture once, whichever clips and runs show it."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[Path, Frame]] = {}
        self._of_clip: dict[str, list[str]] = {}
        self._numbers: dict[str, int] = {}

    def add(self, clip_id: str, folder: Path, frame: Frame) -> str:
        """Take a frame up; returns the name that a view calls it by.

        Raises:
            ValueError: it is missing, or not what was written.
        """
        frame_bytes(folder, frame)
        name = frame["sha256"][:32]
        self._files.setdefault(name, (folder, frame))
        names = self._of_clip.setdefault(clip_id, [])
        self._numbers.setdefault(clip_id, len(self._numbers))
        if name not in names:
            names.append(name)
        return name

    def number(self, clip_id: str) -> int | None:
        """The place of a clip's pictures in what `close` returns; None where it has none."""
        return self._numbers.get(clip_id)

    def close(self, chosen: Sequence[str], out: Path) -> list[dict[str, str]]:
        """Put the pictures where they belong.

        Args:
            chosen: the clips whose pictures the page holds if it cannot hold all, the first ones first.
            out: the page's file; the other pictures are written into a folder beside it.

        Returns:
            for each clip with pictures the source of each by its name.
        """
        few = [clip for clip in chosen if clip in self._of_clip][:FEW_EMBEDDED]
        inside = set(self._of_clip if len(self._of_clip) <= MOST_EMBEDDED else few)
        folder = out.with_name(f"{out.stem}-frames")
        found, outside = list[dict[str, str]](), list[str]()
        for clip, names in self._of_clip.items():
            if clip in inside:
                found.append({name: self._embedded(name) for name in names})
            else:
                outside += names
                found.append({name: f"{quote(folder.name)}/{name}.jpg" for name in names})
        if outside:
            self._write(folder, outside)
        return found

    def _embedded(self, name: str) -> str:
        return f"data:image/jpeg;base64,{base64.b64encode(frame_bytes(*self._files[name])).decode()}"

    def _write(self, folder: Path, names: Iterable[str]) -> None:
        recover_folder(folder)
        with atomic_folder(folder) as place:
            for name in names:
                (place / f"{name}.jpg").write_bytes(frame_bytes(*self._files[name]))
