"""The page's charts as PNG and SVG files, for light and for dark pages, from the same specifications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import atomic_file, write_text
from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.report.page.charts import Ground, layer_figures, theme
from alpamayo_dflash.report.page.data import Figure
from alpamayo_dflash.report.page.runs import Run

with needs("report"):
    import vl_convert

_WIDTH = 620
_SCALE = 2  # of PNG: two pixels a point
_GROUNDS: tuple[Ground, ...] = ("light", "dark")


def write_plots(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Draw figures without a browser or a network.

    Args:
        figures: what is drawn.
        folder: where `NAME-light.png`, `NAME-dark.png` and the same as SVG go; their ground is transparent.

    Returns:
        the files, in order.
    """
    written = []
    for figure in figures:
        for ground in _GROUNDS:
            drawing = drawn([figure], ground)
            paths = [folder / f"{figure.name}-{ground}.{ending}" for ending in ("png", "svg")]
            write_png(drawing, paths[0])
            write_text(paths[1], drawing)
            written += paths
    return written


def drawn(figures: Sequence[Figure], ground: Ground) -> str:
    """Figures as one SVG, each below the one before it with its title."""
    specs: list[dict[str, Any]] = [
        {
            **_renamed(figure.spec, figure.name),
            "width": _WIDTH,
            "title": {"text": figure.table.title, "anchor": "start", "frame": "group"},
        }
        for figure in figures
    ]
    spec = specs[0] if len(specs) == 1 else {"$schema": specs[0]["$schema"], "vconcat": specs}
    spec["datasets"] = {figure.name: figure.table.objects() for figure in figures}
    # No address may be asked for anything: the data are in the specification.
    return str(vl_convert.vegalite_to_svg(spec, config=theme(ground), allowed_base_urls=[]))


def _renamed(spec: Any, name: str) -> Any:
    """A specification whose data have another name than "rows", so that several can stand in one."""
    if isinstance(spec, list):
        return [_renamed(each, name) for each in spec]
    if not isinstance(spec, Mapping):
        return spec
    if spec.get("data") == {"name": "rows"}:
        spec = {**spec, "data": {"name": name}}
    return {key: _renamed(value, name) for key, value in spec.items()}


def write_png(drawing: str, path: Path) -> None:
    """Write an SVG as PNG."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(vl_convert.svg_to_png(drawing, scale=_SCALE))


def plot_scores(content: dict[str, Any], path: Path) -> None:
    """Draw cosine and early-exit cross-entropy by layer, the taps marked; legible on light and dark.

    Args:
        content: what `layers.json` holds.
        path: the PNG to write.
    """
    write_png(drawn(layer_figures([Run("layers", path, layers=content)]), "both"), path)
