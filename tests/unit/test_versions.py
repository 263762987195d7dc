"""What pyproject.toml promises is what is tested, and admits what NVIDIA's packages pin."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import alpamayo_dflash
from alpamayo_dflash.common.artefacts import read_json

ROOT = Path(__file__).parents[2]
# Of alpamayo_r1 and alpamayo1_5, which pin or need these.
PINS = {"torch": "2.8.0", "transformers": "4.57.1", "physical-ai-av": "0.2.0", "pillow": "12.0.0"}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOR_USERS = ("clips", "train", "report")  # the extras; what developers take may be newer


def promised() -> dict[str, Requirement]:
    """The base's packages and the extras', with one bound each."""
    extras = PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *(each for name in FOR_USERS for each in extras[name])]
    found: dict[str, Requirement] = {}
    for each in map(Requirement, listed):
        assert found.setdefault(canonicalize_name(each.name), each) == each, f"{each} has two bounds"
    return found


def pinned(name: str) -> dict[str, Version]:
    lines = (line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def lower(requirement: Requirement) -> Version:
    (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return Version(bound)


@pytest.mark.parametrize(("package", "version"), PINS.items())
def test_nvidias_pins_are_admitted(package: str, version: str) -> None:
    assert Version(version) in promised()[package].specifier


def test_the_oldest_promised_versions_are_the_tested_ones() -> None:
    """torch's own is not among those of `make compat`, but among those of the kept run."""
    tested = pinned("constraints-oldest.txt")
    kept = read_json(ROOT / "docs" / "results" / "compat_cpu.json")["runs"]["nvidia_pins"]["versions"]
    for package, requirement in promised().items():
        found = Version(Version(kept["torch"]).public) if package == "torch" else tested[package]
        assert found == lower(requirement), package
        assert found in requirement.specifier, package


def test_the_first_environments_versions_are_admitted() -> None:
    tested = pinned("constraints.txt")
    for package, requirement in promised().items():
        assert tested[package] in requirement.specifier, package


def test_the_documents_name_the_tested_versions() -> None:
    text = (ROOT / "docs" / "versions.md").read_text()
    newest, oldest = pinned("constraints.txt"), pinned("constraints-oldest.txt")
    gpu = read_json(ROOT / "docs" / "results" / "cuda_tests_h100.json")["versions"]
    for package in ("torch", "transformers", "physical-ai-av"):
        versions = {str(newest[package]), str(lower(promised()[package])), str(oldest[package])}
        for version in versions:
            assert version in text, (package, version)
    for version in (gpu["torch"].removesuffix(".0"), gpu["transformers"]):
        assert version in text, version


def test_the_version_stands_in_one_place() -> None:
    """pyproject.toml reads it from the package, which has it installed or not."""
    read = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]["version"]
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert read == {"attr": "alpamayo_dflash.__version__"}
    assert Version(alpamayo_dflash.__version__).release


def test_the_classifiers_name_the_pythons_that_are_admitted() -> None:
    admitted = SpecifierSet(PROJECT["requires-python"])
    named = {each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each}
    assert named == {f"3.{minor}" for minor in range(30) if f"3.{minor}.0" in admitted}
