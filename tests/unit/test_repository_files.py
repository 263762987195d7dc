"""What GitHub, pre-commit and citation tools read: it parses, and names what is there."""

from __future__ import annotations

import re
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import LONGEST

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted(
    set((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"}
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def make_targets() -> set[str]:
    listed = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed
    return set(listed[1].split())


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_is_there(path: Path) -> None:
    """Commands are `make TARGET` alone, so that anyone can run what the workflow runs."""
    workflow = read(path)
    assert workflow["name"] and workflow[True]  # YAML 1.1 has `on` for a truth value
    assert workflow["permissions"] == {"contents": "read"}
    ran = []
    for step in steps(workflow):
        assert len({"uses", "run"} & step.keys()) == 1, step
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), step
            continue
        command = re.fullmatch(r"make ([a-z-]+)", step["run"])
        assert command, f"{step['run']!r} is no `make TARGET`"
        ran.append(command[1])
    assert ran and set(ran) <= make_targets()


def test_what_is_promised_is_run() -> None:
    """The steps of .ci/run, the wheel and the site, on the first and the last Python."""
    (workflow,) = map(read, WORKFLOWS)
    ran = {step["run"].removeprefix("make ") for step in steps(workflow) if "run" in step}
    here = set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert here and ran == here | {"wheel", "docs"}
    promised = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each]
    for job in ("tests", "wheel"):
        assert workflow["jobs"][job]["strategy"]["matrix"]["python"] == [promised[0], promised[-1]]


def test_the_hooks_before_a_commit_are_targets_of_make() -> None:
    hooks = [hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    entries = {hook["entry"].removeprefix("make ") for hook in hooks}
    assert entries == {"lint", "types"} <= make_targets()
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_an_issue_form_is_one(path: Path) -> None:
    form = read(path)
    assert form["name"] and form["description"]
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert asked and {field["type"] for field in asked} <= {"input", "textarea", "checkboxes", "dropdown"}
    names = [field["id"] for field in asked]
    assert len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in asked)


def test_the_citation_is_of_this_package() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["title"], citation["license"]) == (PROJECT["name"], PROJECT["license"])
    assert citation["abstract"].rstrip(".") == PROJECT["description"]
    assert "version" not in citation  # it stands in the package alone
    cited = {reference["url"].rpartition("/")[2] for reference in citation["references"]}
    assert cited == {"2602.06036", "2511.00088"}
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["alpamayo_dflash.decode.loop", "tests.unit.test_hub"])
def test_what_our_own_code_calls_is_not_deprecated(module: str, category: type[Warning]) -> None:
    """Such a warning at a line of ours fails a test; pyproject.toml's filters say so."""
    line = compile("warnings.warn('is deprecated', category)", module, "exec")
    with pytest.raises(category, match="is deprecated"):
        exec(line, {"__name__": module, "warnings": warnings, "category": category})
    with warnings.catch_warnings(record=True):  # shown, where pytest shows it, and no error
        exec(line, {"__name__": "testsuite.of_another", "warnings": warnings, "category": category})


def test_the_longest_test_files_are_there() -> None:
    """A name that no file has any more would start as late as a short one's, and nobody would see it."""
    files = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(files) == len(set(files)) and len(LONGEST) == len(set(LONGEST))
    assert set(LONGEST) <= set(files)
