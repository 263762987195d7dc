"""The command line: configs from arguments, a fast start, and the options that the documents promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alpamayo_dflash.cli import main as cli
from alpamayo_dflash.cli.demo import DemoConfig, stages
from alpamayo_dflash.cli.overview import GROUPS, overview
from alpamayo_dflash.common.artefacts import to_plain
from alpamayo_dflash.evaluate.config import EvaluateConfig
from alpamayo_dflash.target.checkpoint import SHIPPED, checkpoint_folder
from tests.helpers.public_list import all_fields

DOCUMENT = Path(__file__).parents[2] / "docs" / "commands.md"

# The subcommand that each section of docs/commands.md is about.
SECTIONS = {
    "Clips": "clips",
    "Layers": "layers",
    "Data": "distill",
    "Training": "train",
    "Evaluation": "evaluate",
}

REQUIRED = {
    "world": ["--out", "w"],
    "compare-weights": ["--cache-dir", "c", "--weights", "fp8"],
    "convert": ["--checkpoint", "tiny", "--out", "w", "--weights", "fp8"],
    "clips": ["--cache-dir", "c"],
    "tiny-train": [],
    "measure-tiny": [],
    "measure-world": [],
    "write-random-target": ["--out", "w"],
    "measure-target": ["--target", "t"],
    "layers": ["--output-dir", "o", "--model-path", "m", "--cache-dir", "c"],
    "distill": ["--model-path", "m", "--cache-dir", "c", "--output-dir", "o", "--target-layers", "1,2"],
    "train": ["--target-model", "m", "--data-dir", "d", "--output-dir", "o"],
    "study": ["--out", "o", "--results", "r"],
    "evaluate": ["--draft-model", "d", "--cache-dir", "c"],
    "verify": ["f"],
    "lossless": ["--draft-models", "a", "b", "--cache-dir", "c", "--alpamayo-model", "m"],
    "distribution": ["--draft-model", "d", "--cache-dir", "c", "--alpamayo-model", "m"],
    "bench": [],
    "bench-kernels": [],
    "bench-distill": ["--clips-dir", "c"],
    "report": ["--evaluation", "e.json"],
    "watch": ["r"],
    "demo": ["--out", "o"],
}


def config_class(name: str) -> Any:
    return cli._load(cli.COMMANDS[name].config)


def options(name: str) -> set[str]:
    return {f"--{field.name.replace('_', '-')}" for field in all_fields(config_class(name))}


def documented(kinds: tuple[str, ...]) -> list[tuple[str, str, str, str]]:
    """(subcommand, the prototype's option, kind, what ours is) of each row of docs/commands.md."""
    rows = []
    section = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if section in SECTIONS and len(cells) == 3 and cells[1] in kinds:
            found = re.findall(r"`(--[a-z0-9-]+)", cells[0])
            rows += [(SECTIONS[section], option, cells[1], cells[2]) for option in found]
    return rows


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_subcommand_makes_its_config(name: str) -> None:
    assert set(REQUIRED) == set(cli.COMMANDS)
    found, config = cli.parse([name, *REQUIRED[name]])
    assert found == name
    assert type(config) is config_class(name)


def test_options_reach_the_config() -> None:
    _, config = cli.parse(
        [
            "evaluate",
            *REQUIRED["evaluate"],
            "--num-samples",
            "7",
            "--temperature",
            "0",
            "--no-compare",
            "--verbose",
        ]
    )
    assert config == EvaluateConfig(
        Path("d"), Path("c"), num_samples=7, temperature=0.0, compare=False, verbose=True
    )


@pytest.mark.parametrize(("subcommand", "option", "kind", "ours"), documented(("kept",)))
def test_documented_options_are_kept(subcommand: str, option: str, kind: str, ours: str) -> None:
    assert option in options(subcommand)


def test_every_option_of_the_prototype_is_listed() -> None:
    listed = {option for _, option, _, _ in documented(("kept", "renamed", "changed"))}
    assert len(listed) >= 45
    for option in (
        "--rank",
        "--stride",
        "--kl-temperature",
        "--detailed-timing",
        "--num-chunks",
        "--max-tokens",
    ):
        assert option in listed


@pytest.mark.parametrize(("subcommand", "option", "kind", "ours"), documented(("renamed", "changed")))
def test_documented_replacements_exist(subcommand: str, option: str, kind: str, ours: str) -> None:
    known = set().union(*(options(name) for name in cli.COMMANDS))
    named = set(re.findall(r"`(?:world |train |distill )?(--[a-z0-9-]+)", ours))
    negated = {f"--{each.removeprefix('--no-')}" for each in named if each.startswith("--no-")}
    assert {each for each in named if not each.startswith("--no-")} | negated <= known
    assert named or option in options(subcommand)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", *REQUIRED["evaluate"], "--max-tokens", "0"], "max_tokens is 0"),
        (["evaluate", *REQUIRED["evaluate"], "--top-p", "0"], "top_p is 0"),
        (["evaluate", *REQUIRED["evaluate"], "--clip-id", "a", "--chunks", "0"], "one way only"),
        (["evaluate", "--cache-dir", "c"], "--draft-model"),
        (["lossless", *REQUIRED["lossless"], "--temperature", "0"], "temperature is 0"),
        (["distribution", *REQUIRED["distribution"], "--level", "2"], "level is 2"),
        (["measure-world", "--chunks", "1"], "without cache_dir"),
        (["demo", "--out", "o", "--held-out-chunks", "9"], "held_out_chunks is 9"),
        (["demo", "--out", "o", "--num-samples", "61"], "num_samples is 61"),
        (["evaluat"], "evaluat"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in " ".join(captured.err.replace("│", " ").split())


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from alpamayo_dflash.cli.main import parse\n"
        "try:\n    parse(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'av', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout


def test_help_has_every_subcommand_in_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(cli.COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        cli.parse(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^  ([a-z-]+)  ", printed, re.MULTILINE) == grouped
    assert re.findall(r"^(.+):$", printed, re.MULTILINE) == list(GROUPS)


def test_the_main_job_stands_in_the_documents_order() -> None:
    main_job, *_ = GROUPS.values()
    sections = [SECTIONS[line[3:]] for line in DOCUMENT.read_text().splitlines() if line[3:] in SECTIONS]
    assert [name for name in main_job if name in sections] == sections


@pytest.mark.parametrize("width", [40, 80, 120])
def test_help_keeps_to_its_width(width: int) -> None:
    configs = {name: config_class(name) for name in cli.COMMANDS}
    text = overview("alpamayo-dflash", "What it is.", configs, width)
    first_sentences = {" ".join((kind.__doc__ or "").split("\n\n")[0].split()) for kind in configs.values()}
    assert max(map(len, text.splitlines()[1:-1])) <= width
    assert all(sentence in " ".join(text.split()) for sentence in first_sentences)


def test_a_subcommands_help_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(["evaluate", "--help"])
    assert stopped.value.code == 0
    assert "--draft-model" in capsys.readouterr().out


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("alpamayo_dflash.report.run.run", interrupted)
    assert cli.main(["report", *REQUIRED["report"]]) == 130
    assert capsys.readouterr().out == ""


def test_outside_the_bounds_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("alpamayo_dflash.report.run.run", lambda config: {"passed": False})
    assert cli.main(["report", *REQUIRED["report"]]) == 1
    assert capsys.readouterr().out == '{"passed": false}\n'


def test_demo_keeps_training_and_evaluation_apart() -> None:
    plan = stages(DemoConfig(Path("o"), num_chunks=5, held_out_chunks=2), "target")
    assert plan.layers.chunks == plan.distill.chunks == "0-2"
    assert plan.evaluate.chunks == "3-4"
    assert plan.train.data.held_out_chunks == "2"
    assert plan.train.data.data_dir == plan.distill.output_dir
    assert plan.evaluate.temperature == 0.6 and plan.greedy.temperature == 0.0
    assert plan.evaluate.output_dir != plan.greedy.output_dir
    assert plan.evaluate.cache_dir == plan.world.out


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"clips": {"attempted": 3, "failed": 1}}, "1 of 3 clips failed"),
        ({"nothing_to_do": True}, "nothing to do"),
        ({"clips": {"attempted": 3, "failed": 0}, "nothing_to_do": False}, ""),
        ({"clips": 200}, ""),
    ],
)
def test_what_must_not_be_missed_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: dict[str, object], said: str
) -> None:
    monkeypatch.setattr(cli, "parse", lambda argv: ("clips", None))
    monkeypatch.setattr(cli, "_load", lambda place: lambda config: result)
    assert cli.main([]) == 0
    printed = capsys.readouterr()
    assert said in printed.err
    assert bool(printed.err) == bool(said)
    assert json.loads(printed.out) == result


TARGET_OPTIONS = {
    "measure-tiny": "--checkpoint",
    "measure-world": "--alpamayo-model",
    "tiny-train": "--init-from",
    "measure-target": "--target",
    "bench": "--target",
    "layers": "--model-path",
    "distill": "--model-path",
    "train": "--target-model",
    "evaluate": "--alpamayo-model",
    "lossless": "--alpamayo-model",
    "distribution": "--alpamayo-model",
}


@pytest.mark.parametrize(("name", "option"), TARGET_OPTIONS.items())
def test_every_command_that_takes_a_target_takes_tiny(name: str, option: str) -> None:
    _, config = cli.parse([name, *REQUIRED[name], option, "tiny"])
    part = config.run if name == "train" else config
    given = getattr(part, option[2:].replace("-", "_"))
    assert given == "tiny"  # a Path would be a folder of that name
    assert checkpoint_folder(given) == SHIPPED
    assert str(SHIPPED) not in json.dumps(to_plain(config))


@pytest.mark.parametrize("name", ["measure-tiny", "measure-world"])
def test_the_measurements_of_tiny_take_it_by_themselves(name: str) -> None:
    _, config = cli.parse([name])
    assert "tiny" in to_plain(config).values()


def test_the_demo_names_tiny_in_every_stage() -> None:
    plan = stages(DemoConfig(Path("o")))
    named = (plan.layers.model_path, plan.distill.model_path, plan.train.run.target_model)
    assert {*named, plan.evaluate.alpamayo_model} == {"tiny"}
