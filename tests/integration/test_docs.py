"""The commands and snippets of README.md and docs/ are run, page by page, as a user would.

Each page has a folder of its own and its blocks run in order, so that a command finds what those before it
made. A page's words are changed by `SUBSTITUTIONS` alone, which make things small; what cannot run stands in
`EXCLUDED`. The hub is a stand-in that serves a random target and a synthetic world.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import re
import shlex
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alpamayo_dflash import Alpamayo, ClipSource
from alpamayo_dflash.cli import main as cli
from alpamayo_dflash.standins.blueprint import RandomCheckpointConfig
from alpamayo_dflash.standins.untrained import write_random_checkpoint
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run as write_world
from tests.helpers.documents import Block, blocks, commands
from tests.helpers.hub import Hub
from tests.helpers.loaded_models import TheirAlpamayo, inputs_of
from tests.helpers.public_list import all_fields
from tests.helpers.random_target import random_target

ROOT = Path(__file__).parents[2]
# The log tells of past days' commands; docs/results holds no pages.
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "log.md"})]
KINDS = {"bash", "python", "inline"}
SHOWN = {"text"}  # drawings, which nobody runs
R1, QWEN = "nvidia/Alpamayo-R1-10B", "Qwen/Qwen3-VL-8B-Instruct"

# Why a command is not run, by page and the words that it begins with.
EXCLUDED = {
    ("README.md", "make test"): "that is these tests",
    ("alpamayo.md", "make golden"): "test_golden.py alone, with fixtures that a checkout does not hold",
    ("alpamayo.md", "python3 -m venv"): "test_wheel.py installs the package",
    ("alpamayo.md", ".venv/bin/pip install"): "test_wheel.py installs the package",
    ("alpamayo.md", "hf auth login"): "asks a person",
    ("commands.md", "torchrun"): "several processes: test_train.py",
    (
        "commands.md",
        "alpamayo-dflash bench-kernels",
    ): "times kernels on a GPU, and refuses a CPU: test_bench.py",
    ("commands.md", "alpamayo-dflash bench-distill"): "test_bench_distill_runs.py, on clips that are there",
    ("commands.md", "alpamayo-dflash bench --target"): "runs in alpamayo.md",
    ("commands.md", "alpamayo-dflash bench --train"): "test_bench_runs.py",
    ("commands.md", "alpamayo-dflash bench --beside"): "test_bench_formats.py",
    ("commands.md", "alpamayo-dflash compare-weights"): "runs in fp8.md",
    ("commands.md", "alpamayo-dflash study"): "takes hours; a small one is in test_study.py",
    ("commands.md", "alpamayo-dflash demo"): "runs in README.md, as make demo",
}

_SMALL_DEMO = "--num-chunks 3 --clips-per-chunk 2 --num-samples 2 --layers-clips 2 --num-epochs 1 --workers 1"
_SMALL_BENCH = "--target random:small --device cpu --rows 1 --repeats 2 --texts 3 --lossless-prompts 1"
# By page, what is put in place of its words. {clip} is a clip of the page's world.
SUBSTITUTIONS = {
    "README.md": {
        "make demo": f".venv/bin/alpamayo-dflash demo --out runs/demo {_SMALL_DEMO}",
        "--chunks 9 --num-samples 10": "--chunks 2 --num-samples 2",
        "path/to/checkpoint": "tiny",
        "path/to/draft": "runs/demo/train/draft",
        "path/to/hub-cache": "runs/demo/world",
        "clip id": "{clip}",
    },
    "alpamayo.md": {
        "--device cuda": "--device cpu",
        'device="cuda"': 'device="cpu"',
        "--context-len 64": "--context-len 64 --samples-per-clip 2",
        "--num-samples 32": "--num-samples 2",
        "--num-samples 60": "--num-samples 1",
        "--num-draft-layers 2": "--num-draft-layers 1 --num-epochs 1",
        "--size r1-10b": "--size small",
        "bench --out": f"bench {_SMALL_BENCH} --out",
    },
    "fp8.md": {"--num-chunks 4 --clips-per-chunk 50": "--num-chunks 1 --clips-per-chunk 1 --workers 1"},
    "commands.md": {
        "--out DIR": "--out random",
        "--target DIR": "--target random",
        "--out FILE": "--out figures.json",
        "--size r1-10b": "--size small",
        # Not quick it runs in test_bench_runs.py.
        "--target random:r1-10b --device cuda": "--target random:small --device cpu --repeats 2 --texts 3 "
        "--windows 3 --quick",
        "--device cuda": "--device cpu",
    },
}
OUTPUTS = ("--out", "--output-dir")


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's repositories: R1 with random weights, the Qwen3-VL that it names, and a world of clips."""
    folder = tmp_path_factory.mktemp("hub")
    write_world(WorldConfig(folder / "world", num_chunks=5, clips_per_chunk=2, seed=5, workers=1))
    random_target(folder / "made", layers=6, push=1.5).save_pretrained(folder / R1)
    (folder / QWEN).parent.mkdir()
    shutil.move(folder / R1 / "vlm", folder / QWEN)
    config = folder / R1 / "config.json"
    small = {"vlm_name_or_path": QWEN, "min_pixels": 4096, "max_pixels": 8192}
    config.write_text(json.dumps(json.loads(config.read_text()) | small))
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any try to reach another machine fails the test, also where the code has caught the error."""
    asked: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError(f"a document's command asks the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: refuse(None, given))  # type: ignore[arg-type]
    yield
    assert not asked


class Page:
    """A page at work: the names that its snippets share, and which entries of the tables it has used."""

    def __init__(self, path: Path, hub_files: Path) -> None:
        self.name, self.hub_files = path.name, hub_files
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.used: Counter[str] = Counter()
        self.ran: Counter[str] = Counter()

    def run(self, block: Block) -> None:
        text = self.substituted(block.text)
        if block.kind == "python":
            self.names |= GIVEN.get((self.name, block.section), lambda page: {})(self)
            exec(compile(text, block.place, "exec"), self.names)
            self.ran["python"] += 1
        elif block.kind == "bash":
            # Substitutions change words, not how many commands there are.
            for words, original in zip(commands(text), commands(block.text), strict=True):
                self.command(block, words, original)
        elif block.kind == "inline" and lacks_nothing(shlex.split(block.text)):
            self.command(block, shlex.split(text), shlex.split(block.text))

    def substituted(self, text: str) -> str:
        for words, small in SUBSTITUTIONS.get(self.name, {}).items():
            if words in text:
                self.used[words] += 1
                text = text.replace(words, small)
        return (
            text.replace("{clip}", ClipSource("runs/demo/world").clip_ids()[0]) if "{clip}" in text else text
        )

    def excluded(self, words: list[str]) -> bool:
        """Whether the longest of the entries that the command begins with excludes it."""
        entries = [entry for page, entry in EXCLUDED if page == self.name]
        fits = [entry for entry in entries if words[: len(entry.split())] == entry.split()]
        self.used.update(fits)
        return bool(fits)

    def command(self, block: Block, words: list[str], original: list[str]) -> None:
        if self.excluded(original):
            return
        program = Path(words[0]).name
        before = {path: stamps(path) for path in outputs(words)}
        if program == "alpamayo-dflash":
            if Path(original[0]).name == program:
                cli.parse(original[1:])  # the page's own words are options and values too
            status = cli.main(words[1:])
            assert status == 0, f"{block.place}: {shlex.join(words)}: exit status {status}"
            self.ran[words[1]] += 1
        elif words[:2] == ["hf", "download"]:
            download(self.hub_files, words[2:])
        else:
            pytest.fail(f"{block.place}: neither run nor excluded: {shlex.join(words)}")
        for path, old in before.items():
            assert stamps(path) != old, f"{block.place}: {shlex.join(words)} has written nothing to {path}"


def lacks_nothing(words: list[str]) -> bool:
    """Whether a command in a line of text is a whole one; the options of any must exist."""
    if words[0] != "alpamayo-dflash" or words[1] not in cli.COMMANDS:
        return words != ["alpamayo-dflash", "SUBCOMMAND", "--help"]
    config = cli._load(cli.COMMANDS[words[1]].config)
    fields = {f"--{field.name.replace('_', '-')}": field for field in all_fields(config)}
    given = {word for word in words if word.startswith("--")}
    given = {name if name in fields else name.replace("--no-", "--", 1) for name in given}
    assert given <= fields.keys(), f"{shlex.join(words)}: no such option: {sorted(given - fields.keys())}"
    needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    return bool(given) and needed <= given


def outputs(words: list[str]) -> list[Path]:
    """What a command says that it writes: its output, or the cache that it fetches into."""
    names = OUTPUTS if "--prefetch" not in words else (*OUTPUTS, "--cache-dir")
    return [Path(after) for word, after in itertools.pairwise(words) if word in names]


def stamps(path: Path) -> dict[Path, int]:
    files = [path] if path.is_file() else path.rglob("*")
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def download(hub_files: Path, arguments: list[str]) -> None:
    """`hf download REPOSITORY [--include PATTERN ...] --local-dir FOLDER`, from the stand-in's files."""
    repository, options = arguments[0], arguments[1:]
    folder = Path(options[options.index("--local-dir") + 1])
    patterns = ["*"]
    if options[0] == "--include":
        patterns = options[1 : options.index("--local-dir")]
    files = [path for path in (hub_files / repository).rglob("*") if path.is_file()]
    assert files, f"the stand-in has no {repository}"
    for file in files:
        name = str(file.relative_to(hub_files / repository))
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def loaded(page: Page) -> dict[str, Any]:
    """Another's model and its processor's inputs, in the names that the page has for them."""
    target = page.names["target"]
    prompt = target.prompt(page.names["window"])
    return {
        "model": TheirAlpamayo(target),
        "vlm": target.vlm,
        "tokenizer": target.tokenizer,
        "inputs": inputs_of(prompt),
        "history_xyz": prompt.ego_history_xyz,
        "history_rot": prompt.ego_history_rot,
    }


def of_1_5(page: Page) -> dict[str, Any]:
    """A random target of Alpamayo 1.5."""
    folder = Path("alpamayo-1.5")
    write_random_checkpoint(folder, RandomCheckpointConfig("small", shards=1))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "alpamayo1_5", "architectures": ["Alpamayo1_5"]}
    (folder / "config.json").write_text(json.dumps(config))
    return {"target": Alpamayo.from_pretrained(folder)}


# What a section's snippets take as there.
GIVEN: dict[tuple[str, str], Callable[[Page], dict[str, Any]]] = {
    ("alpamayo.md", "A model that is already loaded"): loaded,
    ("alpamayo.md", "Alpamayo 1.5"): of_1_5,
}


@pytest.fixture
def run_page(
    hub_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> Callable[[str], Page]:
    """Run a page's blocks in order, in a folder of its own."""

    def run(name: str) -> Page:
        torch.manual_seed(0)
        Hub(hub_files / "world").install(monkeypatch)
        monkeypatch.chdir(tmp_path)
        path = next(path for path in PAGES if path.name == name)
        page = Page(path, hub_files)
        for block in blocks(path):
            page.run(block)
        excluded = {entry for name, entry in EXCLUDED if name == page.name}
        assert set(page.used) == excluded | set(SUBSTITUTIONS.get(page.name, {}))
        return page

    return run


def test_the_readme(run_page: Callable[[str], Page]) -> None:
    page = run_page("README.md")
    assert page.ran == {"demo": 1, "watch": 1, "evaluate": 1, "python": 1}
    result = page.names["result"]
    assert result.coc[0] and result.pred_xyz.isfinite().all() and result.acceptance_length >= 1
    recipe = re.search(r"^demo:.*\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe and recipe[1] == "$(BIN)/alpamayo-dflash demo --out $(DEMO_OUT)"
    assert "DEMO_OUT ?= runs/demo\n" in (ROOT / "Makefile").read_text()


def test_the_guide(run_page: Callable[[str], Page]) -> None:
    page = run_page("alpamayo.md")
    chain = {"layers", "distill", "train", "evaluate", "write-random-target", "measure-target", "bench"}
    assert page.ran == {"clips": 2, "python": 5} | dict.fromkeys(chain, 1)
    assert page.names["handover"].past_key_values.get_seq_length() > 0
    assert page.names["result"].pred_xyz is not None and page.names["answer"].pred_xyz is None


def test_the_commands(run_page: Callable[[str], Page]) -> None:
    page = run_page("commands.md")
    assert page.ran == {"write-random-target": 1, "measure-target": 1, "bench": 1, "convert": 1}


def test_fp8(run_page: Callable[[str], Page]) -> None:
    page = run_page("fp8.md")
    chain = ("convert", "world", "compare-weights", "python")
    assert page.ran == dict.fromkeys(chain, 1)
    assert page.names["target"].weight_formats["vision"] == "fp8"


# Pages without a command that runs.
OTHER = {"architecture.md", "page.md", "performance.md", "reliability.md", "training.md", "versions.md"}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_the_other_pages(run_page: Callable[[str], Page], name: str) -> None:
    assert not run_page(name).ran


def test_every_page_is_run() -> None:
    run = {"README.md", "alpamayo.md", "commands.md", "fp8.md", *OTHER}
    assert {path.name for path in PAGES} == run
    assert {*(page for page, _ in EXCLUDED), *SUBSTITUTIONS} <= run
    assert all(reason for reason in EXCLUDED.values())
    sections = {(block.document, block.section) for path in PAGES for block in blocks(path)}
    assert set(GIVEN) <= sections


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_blocks_are_of_a_kind_that_is_run_or_shown(path: Path) -> None:
    for block in blocks(path):
        assert block.kind in KINDS | SHOWN, f"{block.place}: a block of kind {block.kind!r}"
        if block.kind in SHOWN:
            assert "alpamayo-dflash " not in block.text, f"{block.place}: a command that is only shown"


def test_every_subcommand_is_in_the_documents() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    named = {word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()}
    assert set(cli.COMMANDS) <= named


def test_every_target_of_make_that_is_named_is_there() -> None:
    listed = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed
    text = "\n".join(path.read_text() for path in PAGES)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= set(listed[1].split())


def test_a_document_is_taken_apart(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    bash = 'x --a 1 \\\n  --b "c d"    # why\n\n# none\ny\n'
    page.write_text(f"# A\n```bash\n{bash}```\nSee `torchrun x`, `make test`.\n## B\n```\nz\n```\n")
    found = list(blocks(page))
    assert [(block.section, block.kind, block.line) for block in found] == [
        ("A", "bash", 2), ("A", "inline", 9), ("B", "", 11),
    ]  # fmt: skip
    assert commands(found[0].text) == [["x", "--a", "1", "--b", "c d"], ["y"]]
    page.write_text("text\n\n    make test\n")
    with pytest.raises(ValueError, match=r"page\.md:3: an indented block"):
        list(blocks(page))
    page.write_text("```bash\nmake test\n")
    with pytest.raises(ValueError, match="without an end"):
        list(blocks(page))
    for line in ("a | b", "A=1 b"):
        with pytest.raises(ValueError, match=re.escape(line.split()[0])):
            commands(line)
