"""What mkdocs does beside its plugins: the repository's own pages, a page a public name, and links.

The Markdown of this repository is written for its own links: `../README.md`, `results/x.json`, `../src/y.py`.
In the site README.md is the first page, and a file outside `docs/` that a page links to is shown on a page of
its own. A link to what is not there is not turned, so that the strict build names it.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"
PAGES = {
    "index.md": "README.md",
    **{"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"},
}
"""Pages of the site by the files of the repository that they are; those that there are."""

SOURCES = "repository"
"""The site's folder of files that pages link to and that lie outside `docs/`."""

_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]*)(#[^)\s]*)?\)")
_LANGUAGES = {
    ".py": "python",
    ".toml": "toml",
    ".json": "json",
    ".yml": "yaml",
    ".yaml": "yaml",
    ".sh": "bash",
}


def public_names() -> list[str]:
    """The names of `alpamayo_dflash.__all__` that have a page, read without importing the package."""
    source = (ROOT / "src" / "alpamayo_dflash" / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    raise ValueError("src/alpamayo_dflash/__init__.py has no __all__")


def links(markdown: str) -> Iterator[str]:
    """The relative links of a page, without their anchors; code is not looked at."""
    for line, code in _lines(markdown):
        if not code:
            yield from (match[1] for match in _LINK.finditer(line))


def turned(markdown: str, page: str) -> str:
    """A page's Markdown with the site's links in place of the repository's.

    Args:
        markdown: as it stands in the repository.
        page: where the page is in the site, such as "index.md".
    """
    here = posixpath.dirname(page)

    def turn(match: re.Match[str]) -> str:
        place = site_place(repository_place(match[1], page))
        return f"]({posixpath.relpath(place, here or '.')}{match[2] or ''})"

    return "\n".join(line if code else _LINK.sub(turn, line) for line, code in _lines(markdown))


def repository_place(link: str, page: str) -> str:
    """The file of the repository that a page's link means."""
    source = PAGES.get(page, f"{DOCS}/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def site_place(file: str) -> str:
    """Where the site shows a file of the repository."""
    for page, source in PAGES.items():
        if file == source:
            return page
    inside = f"{DOCS}/"
    return file.removeprefix(inside) if file.startswith(inside) else f"{SOURCES}/{file}.md"


def _lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it belongs to fenced code."""
    fenced = False
    for line in markdown.splitlines():
        fence = line.lstrip().startswith("```")
        yield line, fenced or fence
        fenced ^= fence


def _linked_sources(pages: dict[str, str]) -> list[str]:
    """The files outside `docs/` that pages link to and that have no page of their own."""
    found = {repository_place(link, page) for page, text in pages.items() for link in links(text)}
    outside = {file for file in found if site_place(file).startswith(f"{SOURCES}/")}
    return sorted(file for file in outside if (ROOT / file).is_file())


def _shown(file: str) -> str:
    """A file of the repository as a page."""
    content = (ROOT / file).read_text(encoding="utf-8")
    language = _LANGUAGES.get(Path(file).suffix, "text")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return f"---\nsearch:\n  exclude: true\n---\n\n# {file}\n\n{fence}{language}\n{content}\n{fence}\n"


def _api_pages() -> dict[str, str]:
    names = public_names()
    listed = "\n".join(f"- [`{name}`]({name}.md)" for name in names)
    root = "What `from alpamayo_dflash import …` offers. Everything else is internal and may move."
    pages = {"api/index.md": f"# Python API\n\n{root}\n\n{listed}\n"}
    return pages | {f"api/{name}.md": f"::: alpamayo_dflash.{name}\n" for name in names}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made here into the navigation, and take GitHub's anchors."""
    from pymdownx.slugs import slugify

    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    there = [page for page, source in PAGES.items() if (ROOT / source).is_file() and page != "index.md"]
    nav: list[Any] = config.nav or []
    names = [{"Names": "api/index.md"}, *({name: f"api/{name}.md"} for name in public_names())]
    config.nav = [*nav, {"Python API": names}, *there]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's own pages, the API's, and the files that pages link to."""
    from mkdocs.structure.files import File, InclusionLevel

    own = {
        page: (ROOT / source).read_text(encoding="utf-8")
        for page, source in PAGES.items()
        if (ROOT / source).is_file()
    }
    written = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for page, text in {**own, **_api_pages()}.items():
        files.append(File.generated(config, page, content=text))
    for source in _linked_sources({**written, **own}):
        hidden = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, site_place(source), content=_shown(source), inclusion=hidden))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of what stands in the repository; what is made here has the site's already."""
    made = page.file.src_uri.startswith((f"{SOURCES}/", "api/"))
    return markdown if made else turned(markdown, page.file.src_uri)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail where a public name's page does not show it."""
    from mkdocs.exceptions import PluginError

    for name in public_names():
        page = Path(os.fspath(config.site_dir)) / "api" / f"{name}.html"
        if not page.is_file() or f'id="alpamayo_dflash.{name}"' not in page.read_text(encoding="utf-8"):
            raise PluginError(f"{page}: does not show alpamayo_dflash.{name}")
