"""The report's plots, drawn by matplotlib without a display, from the JSON object alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpamayo_dflash.common.artefacts import atomic_file
from alpamayo_dflash.report.tables import ARM_NAMES, WINDOW_PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart also by readers with colour blindness.
_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_GREY = "#767676"  # legible on white and on black alike
WINDOW_ARMS = {
    "ours_1": ("this project", _BLUE),
    "autoregressive_1": ("this project, one token a pass", _ORANGE),
    "compiled_1": ("transformers, compiled", _GREEN),
    "transformers_1": ("transformers, eager", _VERMILION),
    "floor": ("floor", _GREY),
}
"""The arms of a window's bars, from top to bottom: what readers call them, and their colours."""


def all_plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every plot that the JSON object has the numbers for.

    Returns:
        The PNG files, in the order of the report.
    """
    rows = result.get("clip_rows", [])
    drawn: list[Path] = []

    def add(name: str) -> Path:
        drawn.append(folder / f"{name}.png")
        return drawn[-1]

    plot_times(result, add("times"))
    if rows:
        plot_decode_by_length(rows, add("decode_by_length"))
        if result["acceptance_length"] is not None:
            plot_acceptance(rows, result["acceptance_length"], add("acceptance"))
        if len(rows[0]["arms"]) > 1:
            plot_speedup(rows, add("speedup"))
    if result.get("decode_parts"):
        plot_parts(result, add("decode_parts"))
    if result.get("training"):
        plot_training(result, add("training"))
    return drawn


def plot_times(result: Mapping[str, Any], path: Path) -> None:
    """Bars of each arm's median prefill, decode and action time."""
    with _axes(path, "Time of a clip (medians)", "ms") as axes:
        arms = list(result["arms"])[::-1]
        left = [0.0] * len(arms)
        for name, colour in (("prefill", _BLUE), ("decode", _ORANGE), ("action", _GREEN)):
            widths = [result["arms"][arm][f"{name}_ms"] for arm in arms]
            axes.barh([ARM_NAMES[arm] for arm in arms], widths, left=left, color=colour, label=name)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.18))


def plot_decode_by_length(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Decode time of each clip against its number of tokens, one colour an arm."""
    with _axes(path, "Decode time of each clip", "tokens", "decode, ms", height=3.8) as axes:
        colours = {"transformers": _PURPLE, "autoregressive": _BLUE, "dflash": _VERMILION}
        for arm in rows[0]["arms"]:
            tokens = [row["arms"][arm]["tokens"] for row in rows]
            decode = [row["arms"][arm]["decode_ms"] for row in rows]
            axes.scatter(
                tokens, decode, s=14, alpha=0.7, color=colours[arm], label=ARM_NAMES[arm], linewidths=0
            )
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def plot_acceptance(rows: Sequence[Mapping[str, Any]], pooled: float, path: Path) -> None:
    """Histogram of the clips' own acceptance lengths, with the pooled one marked."""
    with _axes(
        path, "Acceptance length of each clip", "tokens after the first, a verify pass", "clips"
    ) as axes:
        found = [row["acceptance"] for row in rows if row["acceptance"]["passes"]]
        lengths = [each["tokens_after_first"] / each["passes"] for each in found]
        axes.hist(lengths, bins=20, color=_BLUE)
        axes.axvline(pooled, color=_VERMILION)
        axes.annotate(
            f" pooled {pooled:.2f}",
            (pooled, 0.95),
            xycoords=("data", "axes fraction"),
            color=_VERMILION,
            va="top",
        )


def plot_speedup(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Histograms of each clip's decode speed-up against the two other arms."""
    with _axes(path, "Decode speed-up of each clip", "times faster", "clips") as axes:
        for arm, colour in (("autoregressive", _BLUE), ("transformers", _PURPLE)):
            pairs = [(row["arms"][arm]["decode_ms"], row["arms"]["dflash"]["decode_ms"]) for row in rows]
            ratios = [slow / fast for slow, fast in pairs if fast > 0]
            axes.hist(ratios, bins=20, color=colour, alpha=0.7, label=f"against {ARM_NAMES[arm]}")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.legend(frameon=False)


def plot_parts(result: Mapping[str, Any], path: Path) -> None:
    """Bars of decode's parts."""
    with _axes(path, "Where decode's time goes", "ms a clip", height=2.6) as axes:
        found = result["decode_parts"]
        names = list(found)[::-1]
        bars = axes.barh(names, [found[name]["ms"] for name in names], color=_BLUE)
        axes.bar_label(bars, [f"{100 * (found[name]['share'] or 0):.1f} %" for name in names], padding=3)


def plot_training(result: Mapping[str, Any], path: Path) -> None:
    """The draft's simulated acceptance length on validation clips as it was trained."""
    with _axes(path, "The draft's training", "step", "simulated acceptance length") as axes:
        entries = result["training"]["evaluations"]
        axes.plot(
            [entry["step"] for entry in entries],
            [entry["acceptance_length"] for entry in entries],
            color=_BLUE,
            marker="o",
            markersize=4,
        )
        axes.set_ylim(bottom=0)


def plot_scores(content: Mapping[str, Any], path: Path) -> None:
    """Draw cosine and early-exit cross-entropy by layer, the chosen taps marked.

    Args:
        content: what `layers.json` holds.
        path: the PNG to write.
    """
    from matplotlib.ticker import MaxNLocator

    ce = {int(layer): value for layer, value in content["early_exit_ce"].items()}
    layers = sorted(ce)
    figure = _canvas(5.5)
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(range(len(content["cosine"])), content["cosine"], marker="o", color="tab:blue")
    above.set_ylabel("cosine to the last layer")
    above.set_title(f"Scores over {content['tokens']} generated tokens; lines mark the taps")
    below.plot(layers, [ce[layer] for layer in layers], marker="o", color="tab:orange")
    below.set_ylabel("early-exit cross-entropy (nats)")
    below.set_xlabel("target layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        for tap in content["target_layers"]:
            axes.axvline(tap, color="tab:green", linestyle="--", linewidth=1)
    _save(figure, path)


def plot_window(results: Mapping[str, Any], path: Path) -> None:
    """Draw `window_bars` on a transparent ground, for pages in light and dark."""
    _save(window_bars(results), path, transparent=True)


def window_bars(results: Mapping[str, Any]) -> Figure:
    """Bars of a window's parts, grouped by part: every arm that was measured, and the floor.

    Args:
        results: `parts`, milliseconds by arm (of `WINDOW_ARMS`; others are not drawn) and part (of
            `WINDOW_PARTS`, and `whole`).
    """
    parts = results["parts"]
    arms = [arm for arm in WINDOW_ARMS if arm in parts]
    figure = _canvas(1.5 + 0.16 * len(WINDOW_PARTS) * (len(arms) + 1))
    axes = figure.add_subplot(xlabel="ms")
    thick = 1 / (len(arms) + 1)
    for row, arm in enumerate(arms):
        name, colour = WINDOW_ARMS[arm]
        there = [index for index, part in enumerate(WINDOW_PARTS) if part in parts[arm]]
        widths = [parts[arm][WINDOW_PARTS[index]] for index in there]
        places = [index + (row - (len(arms) - 1) / 2) * thick for index in there]
        whole = f": {parts[arm]['whole']:.0f} ms in all" if "whole" in parts[arm] else ""
        bars = axes.barh(places, widths, height=0.9 * thick, color=colour, label=name + whole)
        axes.bar_label(bars, [f"{width:.1f}" for width in widths], padding=3, fontsize=8, color=_GREY)
    axes.set_yticks(range(len(WINDOW_PARTS)), WINDOW_PARTS)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_title(
        "A window, camera to trajectory (medians, one sample)", loc="left", fontsize=11, color=_GREY
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_GREY)
    axes.xaxis.label.set_color(_GREY)
    figure.legend(frameon=False, ncols=2, loc="outside lower center", fontsize=9, labelcolor=_GREY)
    return figure


def _canvas(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(7.0, height), layout="constrained")


@contextlib.contextmanager
def _axes(path: Path, title: str, x_label: str, y_label: str = "", height: float = 3.2) -> Iterator[Axes]:
    """The axes of a figure, which is saved afterwards."""
    figure = _canvas(height)
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    _save(figure, path)


def _save(figure: Figure, path: Path, *, transparent: bool = False) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png", transparent=transparent)
