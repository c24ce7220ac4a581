"""The report's plots, as SVG text that is put into the page."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe and Ito's palette: readers with any colour vision can distinguish its colours.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#000000")
AVERAGE = "#444444"
OURS = "alignx"  # the system that is emphasized
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "alignx",
    "svg.fonttype": "none",
}
PANELS_PER_LINE = 4
LOG_FROM = 5.0  # ratios are drawn on a logarithmic scale if the largest is above this


def svg(figure: Figure) -> str:
    """The figure as SVG text; equal figures have equal text."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def scores(systems: dict[str, dict[str, Any]], groups: list[str]) -> str:
    """A panel per axis (and one for "avg" if it is a group) with a bar per system, 0 to 100."""
    figure = _bars({group: {name: s[group] for name, s in systems.items()} for group in groups}, 0.0, "{:.1f}".format)
    for plot in figure.axes:
        plot.set_xlim(0, 100)
        plot.set_xticks([0, 50, 100])
    return svg(figure)


def perplexity(systems: dict[str, dict[str, float]]) -> str:
    """A panel per axis: every system's perplexity over that of the axis's own specialist."""
    axes = systems["base"]
    ratios = {axis: {name: p[axis] / systems[axis][axis] for name, p in systems.items()} for axis in axes}
    figure = _bars(ratios, 1.0, "{:.3f}".format)
    every = [ratio for by_system in ratios.values() for ratio in by_system.values()]
    logarithmic = max(every) > LOG_FROM
    for plot in figure.axes:
        plot.set_xscale("log" if logarithmic else "linear")
        if not logarithmic:
            plot.set_xlim(min(0.8, *every), max(1.5, *every))
        plot.axvline(1.0, color=AVERAGE, linewidth=0.8)
    return svg(figure)


def _bars(panels: dict[str, dict[str, float]], origin: float, label: Callable[[float], str]) -> Figure:
    """Panels that share their systems, with horizontal bars from `origin` and each value in a column on the right."""
    names = list(next(iter(panels.values())))
    columns = min(PANELS_PER_LINE, len(panels))
    lines = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, lines * (0.27 * len(names) + 0.8)), layout=ConstrainedLayoutEngine(wspace=0.08))
        plots = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
        for number, (title, values) in enumerate(panels.items()):
            colour = AVERAGE if title == "avg" else PALETTE[number % len(PALETTE)]
            _panel(plots[number], title, values, origin, label, colour)
        for plot in plots[len(panels) :]:
            plot.remove()
    return figure


def _panel(
    plot: Axes, title: str, values: dict[str, float], origin: float, label: Callable[[float], str], colour: str
) -> None:
    rows = range(len(values))
    bars = plot.barh(rows, [value - origin for value in values.values()], 0.66, left=origin, color=colour)
    for row, (name, value) in enumerate(values.items()):
        weight = "bold" if name == OURS else "normal"
        bars[row].set_alpha(1.0 if name == OURS else 0.55)
        # right of the axes, where no bar is
        plot.annotate(
            label(value), (1.0, row), (31, 0), ("axes fraction", "data"), "offset points",
            ha="right", va="center", fontsize=8, fontweight=weight, annotation_clip=False,
        )  # fmt: skip
    plot.set_title(title, loc="left", color=colour, fontweight="bold", parse_math=False)
    plot.set_yticks(rows, list(values), parse_math=False)
    for tick in plot.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() == OURS else "normal")
    plot.set_ylim(len(values) - 0.4, -0.6)  # the first system on top
    plot.tick_params(axis="y", length=0)
    plot.tick_params(axis="x", labelsize=8)
    plot.spines["left"].set_visible(False)
    plot.grid(axis="x", color="#e6e9ed", linewidth=0.8)
    plot.set_axisbelow(True)


def confusion(counts: list[list[int]], names: list[str]) -> str:
    """The router's confusion matrix, coloured by the share of each row."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 0.75 * len(names), 1.0 + 0.6 * len(names)), layout="constrained")
        plot = figure.subplots()
        shares = np.array(counts) / np.maximum(1, np.sum(counts, axis=1, keepdims=True))
        plot.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i, j in np.ndindex(shares.shape):
            colour = "white" if shares[i, j] > 0.5 else "black"
            plot.text(j, i, str(counts[i][j]), ha="center", va="center", color=colour, fontsize=9)
        plot.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor", parse_math=False)
        plot.set_yticks(range(len(names)), names, parse_math=False)
        plot.set_xlabel("expert that the gate chose")
        plot.set_ylabel("expert of the prompt's axis")
    return svg(figure)


def losses(curves: dict[str, list[float]]) -> str:
    """Training loss by optimizer step, on a logarithmic scale; the legend stands beside the curves."""
    colours = PALETTE[:-1]  # black is ours
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.0), layout="constrained")
        plot = figure.subplots()
        for number, (name, values) in enumerate(curves.items()):
            dashes = ("-", "--", ":")[number // len(colours) % 3]
            style: dict[str, Any] = {"color": colours[number % len(colours)], "linestyle": dashes, "linewidth": 1.1}
            if name == OURS:
                style = {"color": "black", "linewidth": 1.8}
            plot.plot(range(1, len(values) + 1), values, label=name, **style)
        plot.set_yscale("log")
        plot.set_xlabel("optimizer step")
        plot.set_ylabel("training loss")
        plot.grid(axis="y", color="#e6e9ed", linewidth=0.8)
        legend = plot.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for text in legend.get_texts():
            text.set_parse_math(False)
    return svg(figure)
