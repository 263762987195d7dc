"""The documentation's site: links as they stand in the repository lead somewhere, in both places."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

import alpamayo_dflash

ROOT = Path(__file__).parents[2]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def _hooks() -> Any:
    """mkdocs loads them by their path, too."""
    (path,) = SITE["hooks"]
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = _hooks()
PAGES = {path.name: path for path in (ROOT / "docs").glob("*.md")} | {
    page: ROOT / source for page, source in HOOKS.PAGES.items() if (ROOT / source).is_file()
}


def test_a_page_for_every_public_name() -> None:
    """The build makes them, and fails where one does not show its name."""
    public = [name for name in alpamayo_dflash.__all__ if name != "__version__"]
    assert HOOKS.public_names() == public
    made = HOOKS._api_pages()
    assert set(made) == {"api/index.md", *(f"api/{name}.md" for name in public)}
    assert all(f"::: alpamayo_dflash.{name}\n" in made[f"api/{name}.md"] for name in public)
    assert all(f"({name}.md)" in made["api/index.md"] for name in public)


def test_every_page_is_in_the_navigation() -> None:
    listed = [page for entry in SITE["nav"] for page in entry.values()]
    assert sorted(listed) == sorted({"index.md", *(path.name for path in (ROOT / "docs").glob("*.md"))})


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    found = list(HOOKS.links(PAGES[page].read_text()))
    for link in found:
        assert (ROOT / HOOKS.repository_place(link, page)).is_file(), f"{PAGES[page].name}: {link}"
    assert found or page not in {"index.md", "alpamayo.md", "performance.md"}


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "docs/fp8.md#on-a-gpu", "fp8.md#on-a-gpu"),
        ("index.md", "docs/results/x.json", "results/x.json"),
        ("index.md", "CHANGELOG.md", "changelog.md"),
        ("fp8.md", "../README.md#read-on", "index.md#read-on"),
        ("fp8.md", "images/x.png", "images/x.png"),
        ("fp8.md", "../examples/own_proposer.py", "repository/examples/own_proposer.py.md"),
        ("fp8.md", "../Makefile", "repository/Makefile.md"),
        ("fp8.md", "#on-a-gpu", "#on-a-gpu"),
        ("fp8.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("fp8.md", "mailto:a@example.org", "mailto:a@example.org"),
    ],
)
def test_a_link_is_turned(page: str, link: str, expected: str) -> None:
    assert HOOKS.turned(f"a [b]({link}).", page) == f"a [b]({expected})."


def test_pictures_that_are_links_are_turned_and_code_is_not() -> None:
    text = "[![a](docs/images/x.png)](docs/page.md)\n```text\n[b](docs/page.md)\n```\n"
    turned = "[![a](images/x.png)](page.md)\n```text\n[b](docs/page.md)\n```"
    assert HOOKS.turned(text, "index.md") == turned


def test_a_linked_file_is_shown_whole() -> None:
    files = HOOKS._linked_sources({"fp8.md": "[a](../Makefile) [b](../nowhere.py) [c](page.md)"})
    assert files == ["Makefile"]
    assert (ROOT / "Makefile").read_text() in HOOKS._shown("Makefile")
