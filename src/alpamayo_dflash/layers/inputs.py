"""What scoring and data generation start from: the target, and the clips that it writes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from alpamayo_dflash.artefacts import folder_hash

if TYPE_CHECKING:
    from alpamayo_dflash.clips import ClipError, ClipSource, Window
    from alpamayo_dflash.target import Alpamayo


def load_target(
    model_path: str, *, dtype: str | None, device: str, local_files_only: bool
) -> tuple[Alpamayo, str]:
    """Load the target, ready to be run, and the hash of its folder.

    Raises:
        ValueError: the checkpoint is missing or incomplete; the message names what.
    """
    from alpamayo_dflash.target import Alpamayo
    from alpamayo_dflash.target.load import checkpoint_folder

    folder = checkpoint_folder(model_path, local_files_only=local_files_only)
    target = Alpamayo.from_pretrained(folder, dtype=dtype, device=device, local_files_only=local_files_only)
    return target.requires_grad_(False), folder_hash(folder)


def list_hash(names: Sequence[str]) -> str:
    """A short hash of a list of names and of its order: what tells two lists of clips apart."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def progressing_windows(
    source: ClipSource, clip_ids: Sequence[str], t0_us: int, title: str
) -> Iterator[tuple[str, Window | ClipError]]:
    """Read windows ahead of their use, with a progress bar on standard error.

    Args:
        source: the dataset.
        clip_ids: the clips; none gives no window.
        t0_us: the moment of each, microseconds.
        title: what stands before the bar.

    Yields:
        clip id, and its window or why it could not be read.
    """
    from rich.console import Console
    from rich.progress import track

    from alpamayo_dflash.clips import iterate_windows

    if not clip_ids:
        return
    windows = iterate_windows(source, clip_ids, t0_us)
    yield from track(windows, title, total=len(clip_ids), console=Console(stderr=True))
