"""The picture of the two scores by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alpamayo_dflash.artefacts import atomic_file


def plot_scores(content: Mapping[str, Any], path: Path) -> None:
    """Draw cosine and early-exit cross-entropy by layer, the chosen taps marked.

    Args:
        content: what `layers.json` holds.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ce = {int(layer): value for layer, value in content["early_exit_ce"].items()}
    layers = sorted(ce)
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
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
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
