"""Plots of a benchmark, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

OURS, THEIRS = "#1b6ca8", "#9aa5b1"


def subplots(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Like pyplot's subplots, without a window."""
    size = {name: options.pop(name) for name in ("figsize",) if name in options}
    figure = Figure(**size)
    return figure, figure.subplots(rows, columns, **options)


def save(figure: Figure, path: Path, rect: tuple[float, float, float, float] = (0, 0, 1, 1)) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=rect)
    figure.savefig(path, dpi=150)
