"""What the studies' figures share: colours, fonts, and heat maps with their numbers in the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from alignx_ds.evaluation.plots import PALETTE

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "svg.hashsalt": "alignx",
}
LONGEST_NAME = 10  # characters of a column's name that fit beside its neighbours
MUTED, ACCENT = "#9aa5b1", "#1b6ca8"
LABELS = {"alignx": "AlignX"}


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each expert or axis, the same in every figure; the generalist is grey."""
    axes = [name for name in names if name != "generalist"]
    own = {"generalist": "#888888"} | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(axes)}
    return {name: own[name] for name in names}


def label(system: str) -> str:
    return LABELS.get(system, system)


def figure(width: float, height: float) -> Figure:
    """To be called within `styled()`."""
    return Figure(figsize=(width, height), layout="constrained")


def stacked(whole: Figure, heights: Sequence[float]) -> list[Any]:
    """Parts of a figure, one above the other."""
    return list(np.atleast_1d(np.asarray(whole.subfigures(len(heights), 1, height_ratios=list(heights)), dtype=object)))


def styled() -> Any:
    """The style in which every figure is drawn, as a context manager."""
    return mpl.rc_context(STYLE)


def name_columns(plot: Axes, names: Sequence[str]) -> None:
    """Label the columns 0, 1, … on the x axis; names that would run into each other are slanted."""
    longest = max(len(line) for name in names for line in name.split("\n"))
    slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if longest > LONGEST_NAME else {}
    plot.set_xticks(range(len(names)), names, **slant)


def heat(
    plot: Axes,
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    texts: Sequence[Sequence[str]] | None = None,
    span: tuple[float, float] | None = None,
    colours: str = "Blues",
) -> Any:
    """A heat map with a number (or text) in each cell; a cell that is NaN stays white."""
    low, high = span or (float(np.nanmin(values)), float(np.nanmax(values)))
    picture = plot.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for i, j in np.ndindex(values.shape):
        text = texts[i][j] if texts else "" if np.isnan(values[i, j]) else f"{values[i, j]:.0f}"
        r, g, b, _ = picture.cmap(picture.norm(values[i, j])) if np.isfinite(values[i, j]) else (1, 1, 1, 1)
        dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.55
        plot.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
    name_columns(plot, columns)
    plot.set_yticks(range(len(rows)), rows)
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)
    return picture
