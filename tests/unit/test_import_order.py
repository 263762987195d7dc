"""No part imports a later one, and no two files import each other."""

import ast
from pathlib import Path

import pytest

import alpamayo_dflash

ROOT = Path(alpamayo_dflash.__file__).parent
# Parts in one step do not import each other, but for the pairs below.
ORDER = (
    {"common", "kernels", "report"},
    {"clips"},
    {"world", "target"},
    {"draft", "decode"},
    {"standins", "layers", "convert"},
    {"distill"},
    {"train", "phrases"},
    {"drive", "evaluate"},
    {"bench"},
    {"cli"},
)
STEP = {part: index for index, parts in enumerate(ORDER) for part in parts}
BESIDE = {("report", "common"), ("kernels", "common")}
TO_COME = {"phrases", "drive"}
# What a part must not know, beyond the order (docs/architecture.md).
FORBIDDEN = {
    "report": {"torch"},
    "world": {"torch", "transformers"},
    "clips": {"torch", "transformers"},
    "common": {"transformers"},
    "train": {"decode"},
}


def imports(path: Path) -> list[tuple[str, str]]:
    """Module and name of each import of a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def parts(path: Path) -> set[str]:
    """The parts of the package, and the top names of other packages, that a file imports."""
    names = set()
    for module, name in imports(path):
        head, _, rest = module.partition(".")
        names.add((rest.partition(".")[0] or name) if head == "alpamayo_dflash" else head)
    return names


def files(path: Path) -> set[Path]:
    """The package's files that a file imports."""
    found = set()
    for module, name in imports(path):
        head, *rest = module.split(".")
        if head == "alpamayo_dflash":
            places = (ROOT.joinpath(*rest, f"{name}.py"), ROOT.joinpath(*rest).with_suffix(".py"))
            found |= {place for place in places if place.is_file()}
    return found


def test_every_part_has_its_place():
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert there == set(STEP) - TO_COME


@pytest.mark.parametrize("part", sorted(set(STEP) - TO_COME))
def test_no_part_imports_a_later_one(part):
    for path in (ROOT / part).rglob("*.py"):
        names = {name for name in parts(path) if name != part and (part, name) not in BESIDE}
        later = {name for name in names if STEP.get(name, -1) >= STEP[part]}
        assert not later, f"{path.relative_to(ROOT)} imports {sorted(later)}"
        unknown = names & FORBIDDEN.get(part, set())
        assert not unknown, f"{path.relative_to(ROOT)} must not know {sorted(unknown)}"


def test_no_files_import_each_other():
    """In a circle of any length: what imports nothing but settled files is settled."""
    waiting = {path: files(path) for path in ROOT.rglob("*.py")}
    assert sum(map(len, waiting.values())) > 300
    while settled := [path for path, needed in waiting.items() if not needed & waiting.keys()]:
        for path in settled:
            del waiting[path]
    assert not waiting, sorted(str(path.relative_to(ROOT)) for path in waiting)


def test_a_folders_init_holds_its_docstring_alone():
    for path in ROOT.glob("*/**/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path
