"""The report's pictures, as SVG text to be put into the page."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#000000")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "alignx",
    "svg.fonttype": "none",
}


def svg(figure: Figure) -> str:
    """As text, the same for the same figure."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots()


def draw_scores(systems: dict[str, dict[str, Any]], groups: list[str]) -> Figure:
    """Per-axis bars of every system, side by side; "avg" is one of the groups where there is one."""
    figure, plot = _axes(9.5, 3.6)
    _bars(plot, {g: {name: s[g] for name, s in systems.items()} for g in groups}, "%.0f")
    plot.set_ylim(0, 112)
    plot.set_yticks(range(0, 101, 20))
    plot.set_ylabel("score on held-out rows")
    return figure


def _bars(plot: Axes, groups: dict[str, dict[str, float]], label: str) -> None:
    names = list(next(iter(groups.values())))
    width = 0.8 / len(groups)
    for number, (group, heights) in enumerate(groups.items()):
        places = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width
        colour = "#444444" if group == "avg" else PALETTE[number % len(PALETTE)]
        bars = plot.bar(places, [heights[name] for name in names], width * 0.92, label=group, color=colour)
        plot.bar_label(bars, fmt=label, fontsize=7, padding=1)
    plot.set_xticks(np.arange(len(names)), names)
    plot.legend(ncols=len(groups), frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.15))


def scores(systems: dict[str, dict[str, Any]], groups: list[str]) -> str:
    return svg(draw_scores(systems, groups))


def perplexity(systems: dict[str, dict[str, float]]) -> str:
    """Every system's perplexity over that of the axis's own specialist."""
    figure, plot = _axes(9.5, 3.6)
    axes = systems["base"]
    _bars(plot, {a: {name: p[a] / systems[a][a] for name, p in systems.items()} for a in axes}, "%.2f")
    plot.axhline(1.0, color="#444444", linewidth=0.8, linestyle=":")
    plot.set_ylabel("perplexity / own specialist's")
    return svg(figure)


def confusion(counts: list[list[int]], names: list[str]) -> str:
    """The router's confusion matrix, each row a share of its prompts."""
    figure, plot = _axes(4.2, 3.6)
    shares = np.array(counts) / np.maximum(1, np.sum(counts, axis=1, keepdims=True))
    plot.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(shares.shape):
        colour = "white" if shares[i, j] > 0.5 else "black"
        plot.text(j, i, str(counts[i][j]), ha="center", va="center", color=colour, fontsize=9)
    plot.set_xticks(range(len(names)), names, rotation=30, ha="right")
    plot.set_yticks(range(len(names)), names)
    plot.set_xlabel("chosen expert")
    plot.set_ylabel("the prompt's own")
    return svg(figure)


def losses(curves: dict[str, list[float]]) -> str:
    """Training loss by step."""
    figure, plot = _axes(5.6, 3.6)
    for number, (name, values) in enumerate(curves.items()):
        plot.plot(range(1, len(values) + 1), values, label=name, color=PALETTE[number % len(PALETTE)], linewidth=1.1)
    plot.set_yscale("log")
    plot.set_xlabel("optimizer step")
    plot.set_ylabel("training loss")
    plot.legend(fontsize=8, frameon=False)
    return svg(figure)
