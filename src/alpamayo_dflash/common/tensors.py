"""Files of tensors, whose faults are errors that name the file."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights may be stored in."""

MOST_PICKLED = 2**24
"""The most bytes, and entries, of a file that `torch.save` wrote: only vectors are read of such."""

# What torch.load ends in for damaged files: its unpickler checks neither its stack nor its arguments.
_UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, TypeError, AttributeError),
    *(LookupError, ArithmeticError, EOFError, OSError, AssertionError, MemoryError, struct.error),
)


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


def read_pickled(path: Path) -> Any:
    """What `torch.save` wrote, of tensors and plain values alone: nothing of the file is run or imported.

    Raises:
        ValueError: it is missing, is none, or is larger than `MOST_PICKLED` bytes, packed or unpacked.
    """
    size = path.stat().st_size if path.is_file() else 0
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(member.file_size for member in archive.infolist()))
        if size > MOST_PICKLED:
            raise ValueError(f"it has {size} bytes; at most {MOST_PICKLED} are read")
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING_ERRORS as error:
        raise ValueError(
            f"{path}: not a tensor that torch.load reads with weights_only ({type(error).__name__}: {error})"
        ) from None


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file.

    Raises:
        OSError: it cannot be written, for want of space perhaps.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None
