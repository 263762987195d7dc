"""Work split over processes: who does which part, on which device, and whether parts belong together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def share_of(
    rank: int | None, world_size: int | None, environment: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """Which part of the clips this process does.

    Args:
        rank: given explicitly, with `world_size`; or None.
        world_size: likewise.
        environment: where torchrun's RANK and WORLD_SIZE are looked for when nothing is given.

    Returns:
        (rank, world_size); (0, 1) for a process alone.

    Raises:
        ValueError: only one of the two is given, here or in the environment, one there is no number, or the
            rank is not below the world size.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank {rank} and world_size {world_size} must be given together")
    if rank is None or world_size is None:
        given = {name: environment[name] for name in ("RANK", "WORLD_SIZE") if name in environment}
        if not given:
            return 0, 1
        for name in ("RANK", "WORLD_SIZE"):
            if not given.get(name, "").isdecimal():
                raise ValueError(
                    f"{name} is {given.get(name)!r} in the environment ({given}); torchrun sets RANK and "
                    "WORLD_SIZE to whole numbers, and a process alone has neither"
                )
        rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is out of range: world size {world_size} has 0 to {world_size - 1}")
    return rank, world_size


def own_device(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """The device of this process: torchrun's local rank picks the GPU when only "cuda" is asked for."""
    if device == "cuda" and "LOCAL_RANK" in environment:
        return f"cuda:{int(environment['LOCAL_RANK'])}"
    return device


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to mix parts that were made with other settings.

    Args:
        found: the settings recorded in `path`.
        wanted: the settings they must equal.
        path: named in the message.

    Raises:
        ValueError: naming the first setting that differs, and both values.
    """
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{path} was made with {key} {found.get(key)!r}, not {wanted.get(key)!r}; "
                "use the same settings or another output_dir"
            )
