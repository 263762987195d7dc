"""The entry point `alpamayo-dflash`: one subcommand a stage, made from the stage's config.

Every subcommand prints one JSON object as its last line of standard output; tables, progress and errors go
to standard error. Exit status: 0 done; 1 a measurement lies outside its bounds, or every clip failed; 2 bad
input, or a package is not installed; 130 interrupted; 141 nobody reads the output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alpamayo_dflash.cli.overview import asked, overview
from alpamayo_dflash.common.artefacts import to_plain
from alpamayo_dflash.common.extras import MissingPackageError, check_extras

_PROG = "alpamayo-dflash"
_DESCRIPTION = "Lossless speculative decoding of Alpamayo's Chain-of-Causation with DFlash drafts."


@dataclass(frozen=True)
class Command:
    """Where a subcommand's config and its run function are; both are imported only when they are needed.

    Attributes:
        config: the config's class, as module:name under `alpamayo_dflash`.
        run: the function that takes such a config and returns the JSON object, likewise.
        tables: the function that makes the object's tables, which are shown; None for none.
        extras: of this package, without which it ends before it does anything.
    """

    config: str
    run: str
    tables: str | None = None
    extras: tuple[str, ...] = ()


COMMANDS = {
    "world": Command("world.config:WorldConfig", "world.run:run", extras=("clips",)),
    "clips": Command("clips.config:ClipsConfig", "clips.run:run", extras=("clips",)),
    "tiny-train": Command("standins.config:TinyTrainConfig", "standins.run:run", extras=("clips",)),
    "measure-tiny": Command("standins.config:MeasureTinyConfig", "standins.run:measure", extras=("clips",)),
    "measure-world": Command(
        "evaluate.config:MeasureWorldConfig", "evaluate.hardness:run", extras=("clips",)
    ),
    "convert": Command("convert.config:ConvertConfig", "convert.run:run"),
    "layers": Command("layers.config:LayersConfig", "layers.run:run", extras=("clips",)),
    "distill": Command("distill.config:DistillConfig", "cli.distill:run", extras=("clips",)),
    "train": Command("train.config:TrainConfig", "cli.real_acceptance:train", extras=("train",)),
    "evaluate": Command(
        "evaluate.config:EvaluateConfig",
        "evaluate.run:run",
        tables="report.tables:all_tables",
        extras=("clips",),
    ),
    "lossless": Command("evaluate.config:LosslessConfig", "evaluate.lossless:run", extras=("clips",)),
    "distribution": Command(
        "evaluate.config:DistributionConfig", "evaluate.distribution:run", extras=("clips",)
    ),
    "compare-weights": Command(
        "evaluate.config:CompareWeightsConfig",
        "evaluate.distance:run",
        tables="evaluate.distance:tables",
        extras=("clips",),
    ),
    "verify": Command("evaluate.config:VerifyConfig", "evaluate.verify:run"),
    "write-random-target": Command("standins.config:WriteRandomTargetConfig", "standins.untrained:write"),
    "measure-target": Command("bench.config:MeasureTargetConfig", "bench.memory:run"),
    "bench": Command("bench.config:BenchConfig", "bench.run:run", tables="report.tables:bench_tables"),
    "bench-kernels": Command("bench.config:BenchKernelsConfig", "bench.kernels:run"),
    "bench-distill": Command("bench.config:BenchDistillConfig", "bench.distill:run", extras=("clips",)),
    "report": Command("report.config:ReportConfig", "report.run:run", extras=("report",)),
    "watch": Command("report.config:WatchConfig", "report.watch:run"),
    "study": Command(
        "cli.study:StudyConfig",
        "cli.study:run",
        tables="report.tables:study_tables",
        extras=("clips", "train"),
    ),
    "demo": Command(
        "cli.demo:DemoConfig",
        "cli.demo:run",
        tables="report.tables:all_tables",
        extras=("clips", "train", "report"),
    ),
}


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(f"alpamayo_dflash.{module}"), name)


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """The subcommand's name and its config, built.

    Raises:
        SystemExit: help was asked for (0), or the arguments do not fit (2; the message is on standard error).
    """
    configs = {name: _load(command.config) for name, command in COMMANDS.items()}
    if asked(argv):  # tyro knows no groups of subcommands
        print(overview(_PROG, _DESCRIPTION, configs))
        raise SystemExit(0)
    import tyro

    config = tyro.extras.subcommand_cli_from_dict(
        configs,
        prog=_PROG,
        description=_DESCRIPTION,
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),  # nested options have flags by their names alone
    )
    name = next(name for name, kind in configs.items() if type(config) is kind)
    return name, config


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    name, config = parse(sys.argv[1:] if argv is None else argv)
    try:
        check_extras(*COMMANDS[name].extras)
        result = _load(COMMANDS[name].run)(config)
    except (ValueError, OSError, MissingPackageError) as error:
        print(f"alpamayo-dflash {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"alpamayo-dflash {name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    _remark(name, result)
    tables = COMMANDS[name].tables
    try:
        if tables is not None:
            _show(_load(tables)(result))
        if "report" in result:
            print(f"alpamayo-dflash {name}: the page is {result['report']}", file=sys.stderr)
        print(json.dumps(to_plain(result), allow_nan=False), flush=True)
    except BrokenPipeError:
        # Whoever read has gone; Python would write the rest once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return 0 if result.get("passed", True) and not _nothing_done(result) else 1


_BROKEN_PIPE = 128 + 13  # as a shell has it of a program that the signal ends


def _nothing_done(result: dict[str, Any]) -> bool:
    """Whether clips were tried and all failed."""
    clips = result.get("clips")
    return isinstance(clips, dict) and bool(clips.get("attempted")) and clips.get("done") == 0


def _remark(name: str, result: dict[str, Any]) -> None:
    """Say on standard error what must not be missed in the JSON line."""
    if result.get("nothing_to_do"):
        print(f"alpamayo-dflash {name}: nothing to do, it is finished", file=sys.stderr)
    for key, things in (("clips", "clips"), ("prefetch", "chunks")):
        count = result.get(key)
        if isinstance(count, dict) and count.get("failed"):
            line = f"{count['failed']} of {count['attempted']} {things} failed; the reasons are kept"
            print(f"alpamayo-dflash {name}: {line} with the output", file=sys.stderr)


def _show(tables: Sequence[Any]) -> None:
    """Print tables to standard error."""
    from rich.console import Console

    console = Console(stderr=True)
    for table in tables:
        console.print(table.rich())


if __name__ == "__main__":
    sys.exit(main())
