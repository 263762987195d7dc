"""`alpamayo-dflash --help`: the subcommands by what they are for, and what each does."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Mapping, Sequence

GROUPS = {
    "The main job, in its order": (
        *("clips", "convert", "layers", "distill", "train", "evaluate", "report", "watch", "demo"),
    ),
    "Measurements and checks": (
        *("lossless", "distribution", "compare-weights", "verify", "bench", "bench-kernels"),
        *("bench-distill", "measure-target", "study"),
    ),
    "Stand-ins for NVIDIA's data and weights": (
        *("world", "measure-world", "tiny-train", "measure-tiny", "write-random-target"),
    ),
}
"""Every subcommand once; the first group's order is the one in which they are run."""

_INDENT = 2
_WIDEST = 100


def overview(prog: str, description: str, configs: Mapping[str, type], width: int | None = None) -> str:
    """The text of `--help` before any subcommand.

    Args:
        prog: the program's name.
        description: what it is, one line.
        configs: each subcommand's config; its docstring begins with what the subcommand does.
        width: characters of a line; None takes the terminal's, 100 at most.
    """
    width = min(shutil.get_terminal_size().columns, _WIDEST) if width is None else width
    column = _INDENT + max(map(len, configs)) + 2
    parts = [f"usage: {prog} COMMAND [OPTIONS]", textwrap.fill(description, width)]
    for title, names in GROUPS.items():
        lines = [_entry(name, configs[name], column, width) for name in names]
        parts.append("\n".join([f"{title}:", *lines]))
    parts.append(f"{prog} COMMAND --help lists a command's options with their defaults.")
    return "\n\n".join(parts)


def asked(argv: Sequence[str]) -> bool:
    """Whether help is asked for before any subcommand."""
    return len(argv) > 0 and argv[0] in ("-h", "--help")


def _entry(name: str, config: type, column: int, width: int) -> str:
    """A subcommand and what it does, wrapped beside its name."""
    first = (inspect.getdoc(config) or "").partition("\n\n")[0]
    return textwrap.fill(
        " ".join(first.split()),
        width,
        initial_indent=f"{'':{_INDENT}}{name}".ljust(column),
        subsequent_indent=" " * column,
        break_on_hyphens=False,
    )
