"""`make screenshots`: pictures of a run's page for the documentation.

python -m tests.browser.screenshots RUN --out docs/images

Each is a PNG of at most `MOST_BYTES`; where 24-bit colour takes more it has 256 colours.
"""

import argparse
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from alpamayo_dflash.report.page import page
from alpamayo_dflash.report.page.runs import Run, read_runs
from tests.helpers.chromium import Opened, chromium, opened

MOST_BYTES = 300_000


@dataclass(frozen=True)
class Shot:
    """One picture: its file's name, the part of the page that is in view, and how it is looked at."""

    name: str
    show: Callable[[Opened, Run], None]
    width: int = 1440
    height: int = 900
    dark: bool = False


def section(name: str) -> Callable[[Opened, Run], None]:
    """Bring a section to the top, and wait for its charts."""

    def show(found: Opened, _: Run) -> None:
        found.page.evaluate("(id) => document.getElementById(id).scrollIntoView()", name)
        found.settle(
            "() => [...document.querySelectorAll('#overview .chart')].every((each) => each.view "
            "|| each.getBoundingClientRect().top > innerHeight || each.getBoundingClientRect().bottom < 0)"
        )

    return show


def top(found: Opened, run: Run) -> None:
    """The page as it opens."""
    section("overview")(found, run)
    found.page.evaluate("window.scrollTo(0, 0)")


def clip(found: Opened, run: Run) -> None:
    """A clip with many rounds, at one that was partly accepted."""
    row = max(run.rows, key=lambda each: len(each["rounds"][0]))
    rounds = row["rounds"][0]
    number = next((i for i, each in enumerate(rounds) if 0 < len(each["taken"]) < len(each["proposed"])), 0)
    found.page.evaluate(
        "(hash) => { location.hash = hash }", f"#run=0&clip={row['clip_id']}&sample=0&round={number}"
    )
    for name in ("tree", "paths", "timing"):
        found.settle(f"() => document.querySelector('[data-chart=clip-{name}]').view")


def keys(found: Opened, run: Run) -> None:
    """The keys."""
    clip(found, run)
    found.page.keyboard.press("?")


SHOTS = (
    Shot("page_top", top),
    Shot("page_top_dark", top, dark=True),
    Shot("page_clips", section("clips")),
    Shot("page_clip", clip, height=1480),
    Shot("page_clip_dark", clip, height=1480, dark=True),
    Shot("page_clip_narrow", clip, width=390, height=1600),
    Shot("page_keys", keys),
)


def picture(content: bytes) -> bytes:
    """A PNG of at most `MOST_BYTES`.

    Raises:
        ValueError: even with 256 colours it is larger.
    """
    image = Image.open(io.BytesIO(content)).convert("RGB")
    few = image.quantize(256, kmeans=2, dither=Image.Dither.NONE)
    for each in (image, few):
        stream = io.BytesIO()
        each.save(stream, "PNG", optimize=True)
        if stream.tell() <= MOST_BYTES:
            return stream.getvalue()
    raise ValueError(f"a picture takes {stream.tell()} bytes; at most {MOST_BYTES} are wanted")


def take(browser: Any, runs: Sequence[Run], shots: Sequence[Shot], out: Path) -> None:
    """Make the page of some runs, and its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.html")
        page.write(runs, page.sections_of(runs), file)
        for shot in shots:
            with opened(browser, file, width=shot.width, dark=shot.dark) as found:
                found.page.set_viewport_size({"width": shot.width, "height": shot.height})
                shot.show(found, runs[0])
                found.page.wait_for_timeout(300)
                content = picture(found.page.screenshot())
            (out / f"{shot.name}.png").write_bytes(content)
            print(f"{shot.name}.png {len(content)} bytes")


def main() -> None:
    """The demo's page, and that of its sampled evaluation beside its greedy one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    runs = read_runs([given.run])
    charts = [each.id for each in page.sections_of(runs) if each.figures]
    both = read_runs([given.run / name for name in ("evaluation", "evaluation-greedy")])
    with chromium() as browser:
        take(browser, runs, [*SHOTS, *(Shot(f"page_{name}", section(name)) for name in charts)], given.out)
        take(browser, both, [Shot("page_compared", section("compare"))], given.out)


if __name__ == "__main__":
    main()
