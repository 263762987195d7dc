"""What pyproject.toml promises is what is tested, and admits what NVIDIA's packages pin."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from alpamayo_dflash.common.artefacts import read_json

ROOT = Path(__file__).parents[2]
# Of alpamayo_r1 and alpamayo1_5, which pin or need these.
PINS = {"torch": "2.8.0", "transformers": "4.57.1", "physical-ai-av": "0.2.0", "pillow": "12.0.0"}


def promised() -> dict[str, Requirement]:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {canonicalize_name(each.name): each for each in map(Requirement, listed)}


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


def test_the_readme_names_the_tested_versions() -> None:
    text = (ROOT / "README.md").read_text()
    newest, oldest = pinned("constraints.txt"), pinned("constraints-oldest.txt")
    gpu = read_json(ROOT / "docs" / "results" / "cuda_tests_h100.json")["versions"]
    for package in ("torch", "transformers", "physical-ai-av"):
        versions = {str(newest[package]), str(lower(promised()[package])), str(oldest[package])}
        for version in versions:
            assert version in text, (package, version)
    for version in (gpu["torch"].removesuffix(".0"), gpu["transformers"]):
        assert version in text, version
