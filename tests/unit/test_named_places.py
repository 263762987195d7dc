"""The places in the code that documents for contributors name are there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "alpamayo_dflash"


def names(path):
    """What a file defines: functions, classes, methods with their class's name before, constants."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            found |= {node.name, *(f"{node.name}.{method}" for method in methods)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def round_steps():
    text = (ROOT / "docs" / "architecture.md").read_text()
    return text.partition("### A round, step by step")[2].partition("\n## ")[0]


def test_a_rounds_steps_are_numbered_and_where_they_are_said_to_be():
    rows = re.findall(r"^\| (\d+) \|", round_steps(), re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 13))
    places = re.findall(r"`(\w+\.py):([\w.]+)`", round_steps())
    assert len(places) >= 25
    for file, name in places:
        assert name in names(PACKAGE / "decode" / file), f"{file}:{name}"


GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_guides_files_are_there():
    """Paths between backticks and in commands: from the checkout's folder or the package's."""
    found = set(re.findall(r"`([\w./]+/[\w.]*)`", GUIDE)) | set(re.findall(r"\btests/[\w/]+\.py", GUIDE))
    paths = {path for path in found if not path.startswith(".venv") and "X" not in path}
    assert len(paths) > 40
    missing = [path for path in sorted(paths) if not ((ROOT / path).exists() or (PACKAGE / path).exists())]
    assert not missing


def test_the_guides_tests_are_there():
    defined = set().union(*(names(path) for path in (ROOT / "tests").rglob("test_*.py")))
    named = set(re.findall(r"`(test_\w+)`", GUIDE))
    assert len(named) >= 8
    assert named <= defined
