"""Files of tensors, whose faults are errors that name the file, with a checksum of every tensor of our own.

The checksums stand in the header's metadata, so that the header's hash vouches for all of the file and one
tensor is tested without reading the others. Files of others have none and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
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

from alpamayo_dflash.common.fields import checked
from alpamayo_dflash.common.json_text import parse_json

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights may be stored in."""

MOST_PICKLED = 2**24
"""The most bytes, and entries, of a file that `torch.save` wrote: only vectors are read of such."""

# What torch.load ends in for damaged files: its unpickler checks neither its stack nor its arguments.
_UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, TypeError, AttributeError),
    *(LookupError, ArithmeticError, EOFError, OSError, AssertionError, MemoryError, struct.error),
)

_CHECKSUMS = "sha256"
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_LENGTH_BYTES = 8  # of the header's length, little-endian, before the header


class TensorFile:
    """A safetensors file, open; tensors with a checksum are held to it as they are read.

    Attributes:
        path: the file.
        recorded: whether it has checksums.
    """

    def __init__(self, path: Path) -> None:
        """Open it; tensors are read when asked for.

        Raises:
            ValueError: the file is missing or corrupt.
        """
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        self._checksums = _checksums(self._file.metadata(), path)
        self.recorded = self._checksums is not None

    def close(self) -> None:
        """Give up the file; tensors that were read stay."""
        self._file.__exit__(None, None, None)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        names: list[str] = self._file.keys()
        return names

    def get_slice(self, name: str) -> Any:
        """A tensor's shape and kind, with nothing read."""
        return self._file.get_slice(name)

    def mapped(self, name: str) -> Tensor:
        """A tensor whose bytes are read when they are used, on the CPU; nothing is tested.

        Raises:
            ValueError: there is no such tensor.
        """
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: {name} cannot be read ({error})") from None
        return tensor

    def get_tensor(self, name: str) -> Tensor:
        """A tensor, on the CPU.

        Raises:
            ValueError: there is no such tensor, or it is not what was written.
        """
        tensor = self.mapped(name)
        if self._checksums is not None and self._checksums.get(name) != checksum(tensor):
            raise ValueError(f"{self.path}: corrupt, {name} is not what was written")
        return tensor


def checksum(tensor: Tensor) -> str:
    """The SHA-256 over a tensor's kind, shape and bytes, in hex."""
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}\n".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def header_hash(path: Path) -> str:
    """The SHA-256 of a file's header, in hex: of its tensors' places and checksums.

    Raises:
        ValueError: the file is missing or cut short.
    """
    return hashlib.sha256(_header(path)).hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a file to read tensors one by one, and close it.

    Raises:
        ValueError: the file is missing or corrupt.
    """
    file = TensorFile(path)
    try:
        yield file
    finally:
        file.close()


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
    """Write a file, with checksums.

    Raises:
        OSError: it cannot be written, for want of space perhaps.
    """
    checksums = {name: checksum(tensors[name]) for name in sorted(tensors)}
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", _CHECKSUMS: json.dumps(checksums)})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None
    _order_metadata(path)


def _order_metadata(path: Path) -> None:
    """Put the header's metadata in order: safetensors writes it in any, and equal files must be equal."""
    header = _header(path)
    content = json.loads(header)
    content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    ordered = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header))
    assert len(ordered) == len(header)
    with path.open("r+b") as stream:
        stream.seek(_LENGTH_BYTES)
        stream.write(ordered)


def _header(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length > min(path.stat().st_size, _LONGEST_HEADER):
                raise ValueError(f"{path}: not a whole safetensors file")
            return stream.read(length)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _checksums(metadata: Mapping[str, str] | None, path: Path) -> dict[str, str] | None:
    """The checksums in a header's metadata; None where it has none."""
    text = (metadata or {}).get(_CHECKSUMS)
    if text is None:
        return None
    where = f"{path}: its checksums"
    found: dict[str, str] = checked(parse_json(text, where), dict[str, str], where)
    return found
