"""The page: one HTML file that holds its data, its charts' program and its style, and asks no network."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import write_text
from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.report.page.clips import clips_context
from alpamayo_dflash.report.page.islands import island, visible
from alpamayo_dflash.report.page.runs import Run

with needs("report"):
    import vl_convert
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Path(__file__).parent / "templates"


def write_page(runs: Sequence[Run], context: Mapping[str, Any], out: Path) -> None:
    """Write the page of runs.

    Args:
        runs: what it shows.
        context: what `page.html.j2` takes, without the clips' views and the program.
        out: the HTML file.
    """
    template = environment().get_template("page.html.j2")
    program = {"vega": vega_program(), "page_style": _part("page.css"), "page_script": _part("page.js")}
    program |= {"clips_style": _part("clips.css"), "clips_script": _part("clips.js")}
    write_text(out, template.render({**context, **program, **clips_context(runs, out)}))


@functools.cache
def environment() -> Environment:
    """The templates; every value in them is escaped, and a name that is not there is an error."""
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(island=island, visible=visible)
    return found


@functools.cache
def vega_program() -> str:
    """Vega, Vega-Lite and vega-embed as one script; it defines `vegaEmbed` and `vega`.

    It stands in the page as it is: it is the library's own, and holds no text of a run.

    Raises:
        ValueError: it holds what would end the page's script.
    """
    program: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed; window.vega = vega;")
    if "</script" in program.lower() or "<!--" in program:
        raise ValueError("the charts' program has '</script' or '<!--' in it, and cannot stand in a page")
    return program


def _part(name: str) -> str:
    """A style or a script of the package, as it is."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")
