"""safetensors files, whose faults are errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file to read tensors one by one.

    Raises:
        ValueError: the file is missing or corrupt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a whole file onto the CPU.

    Raises:
        ValueError: the file is missing or corrupt.
    """
    with opened(Path(path)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file.

    Raises:
        OSError: it cannot be written, for want of space perhaps.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None
