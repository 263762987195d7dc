"""No part imports a later one."""

import ast
from pathlib import Path

import pytest

import alpamayo_dflash

ROOT = Path(alpamayo_dflash.__file__).parent
# Parts in one step do not import each other.
ORDER = (
    {"artefacts", "kernels"},
    {"clips"},
    {"world"},
    {"target"},
    {"decode"},
    {"tiny"},
    {"layers"},
    {"distill"},
    {"draft"},
    {"train"},
    {"evaluate"},
    {"report"},
    {"cli"},
)
STEP = {part: index for index, parts in enumerate(ORDER) for part in parts}
# What a part must not know, beyond the order (docs/architecture.md).
FORBIDDEN = {
    "target": {"decode"},
    "draft": {"decode"},
    "train": {"decode"},
    "report": {"torch", "decode", "draft", "train", "target", "evaluate"},
    "world": {"torch", "transformers"},
    "clips": {"torch", "transformers"},
}


def imported(path: Path) -> set[str]:
    """The parts of the package, and the top names of other packages, that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module == "alpamayo_dflash":
                modules = [f"alpamayo_dflash.{alias.name}" for alias in node.names]
        for module in modules:
            head, _, rest = module.partition(".")
            names.add(rest.partition(".")[0] if head == "alpamayo_dflash" else head)
    return names


def test_every_part_has_its_place():
    parts = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert parts == set(STEP) - {"artefacts"}


@pytest.mark.parametrize("part", sorted(set(STEP) - {"artefacts"}))
def test_no_part_imports_a_later_one(part):
    for path in (ROOT / part).rglob("*.py"):
        names = imported(path) - {part}
        later = {name for name in names if STEP.get(name, -1) >= STEP[part]}
        assert not later, f"{path.relative_to(ROOT)} imports {sorted(later)}"
        unknown = names & FORBIDDEN.get(part, set())
        assert not unknown, f"{path.relative_to(ROOT)} must not know {sorted(unknown)}"
