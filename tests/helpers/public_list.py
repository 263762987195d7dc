"""Writes `tests/data/commands.json`: every subcommand's flags with their defaults, as a stored list.

`python -m tests.helpers.public_list` after a flag was added. A flag that is gone, or has another default,
needs a word in `CHANGELOG.md`.
"""

import dataclasses
import json
import typing
from pathlib import Path

from alpamayo_dflash.cli import main as cli

FILE = Path(__file__).parents[1] / "data" / "commands.json"


def flags():
    """Flag and default by subcommand; "required" where there is no default."""
    return {name: _flags(cli._load(command.config)) for name, command in cli.COMMANDS.items()}


def _flags(config):
    return {
        "--" + field.name.replace("_", "-"): "required"
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        else repr(str(field.default) if isinstance(field.default, Path) else field.default)
        for field in all_fields(config)
    }


def all_fields(config):
    """A config's options, those of its components too: their flags are their names alone."""
    found, kinds = [], typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = kinds[field.name]
        found += all_fields(kind) if dataclasses.is_dataclass(kind) else [field]
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(flags(), indent=1) + "\n")
