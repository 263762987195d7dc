"""What every stage shares: atomic writes, hashes, and the record of where an artefact came from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alpamayo_dflash import __version__
from alpamayo_dflash.common.json_text import read_json_value
from alpamayo_dflash.common.records import sealed, unsealed

# The packages whose versions can change a number.
_LIBRARIES = ("torch", "triton", "transformers", "tokenizers", "numpy", "physical_ai_av", "av")

IDENTITY = 2
"""The rule that models' hashes are made by, see `common.identity`; records of the first do not name it."""

_ASIDE = ".old"
_TEMPORARY = re.compile(r"\..+(\.[^.]+)\.[a-z0-9_]{8}\1")  # `atomic_file`'s: the ending stands twice
_NUMBERS = re.compile(r"\[\n\s*([-+.0-9eE,\s]+?)\n\s*\]")


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes `path`'s place on success and is removed on error."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes `path`'s place, whole, on success.

    Killed between its two renames, it leaves the old folder aside; `recover_folder` puts it back.
    """
    path = Path(path).resolve()  # a link to another disk stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        # A folder cannot be replaced in one step: the old one goes aside, so that a whole one always exists.
        aside = temporary.with_name(f"{temporary.name}{_ASIDE}")
        if path.exists():
            path.replace(aside)
        temporary.replace(path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(path: Path | str) -> None:
    """Undo what a killed `atomic_folder` left: put the old folder back if none is there, and clear the rest.

    Nobody else may be writing the folder.
    """
    path = Path(path).resolve()
    for aside in sorted(path.parent.glob(f".{path.name}.*{_ASIDE}")):
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.replace(path)
    for temporary in path.parent.glob(f".{path.name}.*"):
        if temporary.is_dir():
            shutil.rmtree(temporary)


def clear_temporaries(folder: Path) -> None:
    """Remove what killed `atomic_file`s left in a folder and below; nobody else may be writing there."""
    for path in folder.rglob(".*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def move_aside(path: Path, mark: str, what: str) -> None:
    """Give a file another name beside its own, made of a mark of what it holds, and print that."""
    aside = path.with_name(f"{path.stem}.of-{mark}{path.suffix}")
    path.replace(aside)
    print(f"{path}: held {what}, now in {aside.name}", file=sys.stderr)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically; a list of numbers takes one line.

    Dataclasses and paths are converted.
    """
    text = json.dumps(to_plain(value), indent=1, allow_nan=False) + "\n"
    # Only between elements does JSON break lines, so nothing inside a string is touched.
    write_text(path, _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text))


def write_record(path: Path | str, value: Mapping[str, Any]) -> None:
    """Write an object as `write_json` does, with a checksum that `read_json` holds it to."""
    write_json(path, sealed(to_plain(value)))


def read_json(path: Path | str, *keys: str) -> dict[str, Any]:
    """Read a JSON file that holds an object, which is held to its checksum if it has one.

    Args:
        path: the file.
        keys: that the object must have.

    Raises:
        ValueError: the file is missing, is not JSON, holds something else, lacks a key, or is not what was
            written; the message names it.
    """
    value, _ = read_record(path)
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{path}: has no {missing[0]}")
    return value


def read_record(path: Path | str) -> tuple[dict[str, Any], bool]:
    """Read a JSON file that holds an object: the object, and whether it had a checksum.

    Raises:
        ValueError: as `read_json`.
    """
    value = read_json_value(Path(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {_kind_of(value)}, not an object")
    return unsealed(value, str(path))


def _kind_of(value: Any) -> str:
    """What a JSON value is called."""
    if value is None:
        return "null"
    names = {list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")


def to_plain(value: Any) -> Any:
    """Turn dataclasses, paths, tuples and mappings into what JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def file_hash(path: Path | str) -> str:
    """The SHA-256 of a file, in hex."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_hash(path: Path | str) -> str:
    """The SHA-256 over the names and contents of a folder's files, hidden ones left out."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            digest.update(f"{relative.as_posix()}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()


def git_revision() -> str | None:
    """The commit of the checkout the package lies in, with `-dirty` if it has changes.

    Outside a checkout (in a container, say) it is what `ALPAMAYO_DFLASH_REVISION` says, or None.
    """
    wanted = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    found = answer_of("git", *wanted, folder=Path(__file__).parent)
    return found or os.environ.get("ALPAMAYO_DFLASH_REVISION") or None


def answer_of(tool: str, *arguments: str, folder: Path | None = None) -> str | None:
    """What a tool of the system prints, stripped; None where it is missing, fails or prints nothing."""
    path = shutil.which(tool)
    if path is None:
        return None
    try:
        answer = subprocess.run(  # noqa: S603
            [path, *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the libraries that can change a number."""
    found = {"python": platform.python_version(), "alpamayo-dflash": __version__}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance(
    config: Any,
    started: float,
    parents: Mapping[str, str] | None = None,
    *,
    device: str | None = None,
    identity: int = IDENTITY,
) -> dict[str, Any]:
    """The record kept with every artefact.

    Args:
        config: the stage's config, a dataclass; its seed and device are recorded where it has them.
        started: `time.time()` when the stage began; the wall time is taken from it.
        parents: name to hash of each artefact it was made from.
        device: the torch device that was taken, where that is not the config's own word.
        identity: the rule of the parents' hashes, where they are taken over from an older artefact.
    """
    return {
        "config": to_plain(config),
        "parents": dict(parents or {}),
        "identity": identity,
        "seed": getattr(config, "seed", None),
        "device": _device_name(device or str(getattr(config, "device", "cpu"))),
        "versions": versions(),
        "revision": git_revision(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_s": round(time.time() - started, 3),
    }


def _device_name(device: str) -> str:
    """A device's own name: the GPU's, or the processor's architecture and count of cores."""
    if device.startswith("cuda"):
        import torch  # here, so that who only reads artefacts does not load it

        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def list_hash(names: Sequence[str]) -> str:
    """A short hash of a list of names and of its order: what tells two lists of clips apart."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
