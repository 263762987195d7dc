"""Debian's Chromium, headless, opening a page from disk: what it printed and what it asked for is kept."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REQUIRED = "ALPAMAYO_CHROMIUM"
"""With this set to "required" a missing Chromium is an error; `.ci/run` sets it."""
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium_path() -> str | None:
    """The browser's program; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def missing() -> str:
    """What the browser's tests lack, and how it comes; "" where nothing is missing."""
    if chromium_path() is None:
        return f"no Chromium on PATH ({', '.join(NAMES)}); `apt-get install chromium` brings one"
    for library in ("playwright", "axe_playwright_python"):
        if find_spec(library) is None:
            return f"{library} is not installed; the extra `dev` brings it"
    return ""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser.

    Raises:
        RuntimeError: it, or what drives it, is missing.
    """
    if lacking := missing():
        raise RuntimeError(lacking)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path())
        try:
            yield browser
        finally:
            browser.close()


def is_required() -> bool:
    """Whether the browser's tests may not be skipped."""
    return os.environ.get(REQUIRED) == "required"


@dataclass
class Opened:
    """A page that was opened from disk.

    Attributes:
        page: playwright's.
        errors: what it printed as an error, and what it threw.
        requests: what it asked for beyond its own file and the pictures beside it; each was refused.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def settle(self, condition: str, argument: Any = None) -> None:
        """Wait until a function of the page is true."""
        self.page.wait_for_function(condition, arg=argument, timeout=10_000)


@contextlib.contextmanager
def opened(
    browser: Any, file: Path, *, width: int = 1440, dark: bool = False, hash_: str = ""
) -> Iterator[Opened]:
    """Open a file in a window of its own; nothing but the file and its folder can be read."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found = Opened(context.new_page())
    inside = file.resolve().parent.as_uri() + "/"

    def route(each: Any) -> None:
        if each.request.url.startswith(inside):
            each.continue_()
        else:
            found.requests.append(each.request.url)
            each.abort()

    context.route("**/*", route)
    found.page.on("console", lambda each: found.errors.append(each.text) if each.type == "error" else None)
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    try:
        found.page.goto(file.resolve().as_uri() + hash_)
        yield found
    finally:
        context.close()


def axe_violations(found: Opened) -> list[dict[str, Any]]:
    """What axe-core calls serious or critical in what is shown: id and the elements' text."""
    import axe_playwright_python

    found.page.wait_for_timeout(100)  # what has just been drawn is in the tree
    script = Path(axe_playwright_python.__file__).parent / "axe.min.js"
    found.page.evaluate(script.read_text(encoding="utf-8"))
    result = found.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        {"id": each["id"], "nodes": [node["html"][:200] for node in each["nodes"]]}
        for each in result["violations"]
        if each["impact"] in ("serious", "critical")
    ]
