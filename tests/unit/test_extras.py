"""What decoding takes is all that it asks for; every other package is named with what brings it."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import alpamayo_dflash
from alpamayo_dflash.cli.main import COMMANDS, _load, main
from alpamayo_dflash.common.extras import DISTRIBUTIONS, EXTRAS, MissingPackageError, check_extras, needs
from tests.helpers.public_list import all_fields

ROOT = Path(alpamayo_dflash.__file__).parent
CHECKOUT = Path(__file__).parents[2]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
BASE = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "tyro", "rich"}
# Comes with torch where there are GPUs for it; who imports it has looked for it, or is a kernel.
OPTIONAL = {"triton"}
# What an import takes beside the package that it names.
BEHIND = {"torch.utils.tensorboard": "tensorboard"}


@pytest.mark.parametrize("module", EXTRAS["train"])
def test_training_names_its_packages(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it reads anything: neither the data nor the folder are there."""
    arguments = ["train", "--target-model", "tiny", "--data-dir", "none", "--output-dir", str(tmp_path / "o")]
    monkeypatch.setitem(sys.modules, module, None)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"alpamayo-dflash train: {module} is not installed; ")
    assert error.endswith(": pip install 'alpamayo-dflash[train]'\n")
    assert not (tmp_path / "o").exists()


def test_another_failure_of_an_import_goes_on() -> None:
    with pytest.raises(ModuleNotFoundError, match="nobody") as failed, needs("clips"):
        import nobody  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(failed.value, MissingPackageError)
    with pytest.raises(ImportError, match="broken"), needs("clips"):
        raise ImportError("broken", name="av")


def test_a_whole_extra_is_looked_for_before_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in EXTRAS:
        check_extras(extra)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingPackageError, match=r"^vl-convert-python is not installed") as failed:
        check_extras("report")
    assert failed.value.name == "vl_convert"
    for module in ("tensorboard", "av"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError) as failed:
        check_extras("clips", "train", "report")
    assert str(failed.value) == (
        "av, tensorboard, vl-convert-python are not installed; "
        "to install: pip install 'alpamayo-dflash[clips,train,report]'"
    )
    check_extras()


def test_each_subcommand_names_its_extras() -> None:
    """The base's are those that the documents promise; those that read clips take their extra."""
    extras = {name: command.extras for name, command in COMMANDS.items()}
    assert set().union(*extras.values()) == set(EXTRAS)
    base = {name for name, found in extras.items() if not found}
    assert base == {
        "bench",
        "bench-kernels",
        "convert",
        "measure-target",
        "verify",
        "watch",
        "write-random-target",
    }
    assert extras["demo"] == tuple(EXTRAS)
    for name in COMMANDS.keys() - base:
        config = COMMANDS[name].config
        fields = {field.name for field in all_fields(_load(config))}
        assert ("clips" in extras[name]) >= ("cache_dir" in fields), name


def requirements(extra: str) -> set[str]:
    return {Requirement(each).name for each in PROJECT["optional-dependencies"][extra]}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_brings_what_is_promised_of_it(extra: str) -> None:
    assert requirements(extra) == {DISTRIBUTIONS.get(module, module) for module in EXTRAS[extra]}


def test_all_brings_every_extra() -> None:
    (every,) = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert every.name == PROJECT["name"] and every.extras == set(EXTRAS)


def imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """Each foreign package that a file imports when it runs, and the extra that its `with` names."""
    extras: dict[ast.AST, str] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            extras |= dict.fromkeys(ast.walk(node), "types")
        elif isinstance(node, ast.With) and ast.unparse(node.items[0]).startswith("needs("):
            extra = ast.literal_eval(node.items[0].context_expr.args[0])  # type: ignore[attr-defined]
            extras |= dict.fromkeys(ast.walk(node), extra)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            package = BEHIND.get(name, name.partition(".")[0])
            if package not in sys.stdlib_module_names and package != "alpamayo_dflash":
                yield package, extras.get(node)


def test_every_import_is_of_the_base_or_named() -> None:
    """Walked from above, so a `with` is met before what stands in it."""
    seen = set()
    for path in ROOT.rglob("*.py"):
        for package, extra in imported(path):
            place = f"{path.relative_to(ROOT)} imports {package}"
            if extra == "types" or package in BASE | OPTIONAL:
                continue
            assert extra is not None, f"{place}, which belongs in `with needs(EXTRA):`"
            assert package in EXTRAS[extra], f"{place}, which [{extra}] does not bring"
            seen.add((extra, package))
    assert seen >= {("clips", "av"), ("train", "tensorboard"), ("report", "altair")}
    assert {Requirement(each).name for each in PROJECT["dependencies"]} == BASE
