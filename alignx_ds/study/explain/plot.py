"""An explanation as a plot: for each prompt the experts' logits, term by term, and their confidences."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignx_ds.errors import visible
from alignx_ds.evaluation.plots import PALETTE, STYLE, svg
from alignx_ds.runs import manifest
from alignx_ds.study.explain.choices import Candidate, Choice
from alignx_ds.study.explain.explanation import Explained
from alignx_ds.study.explain.text import percent, quoted

COLOURS = dict(zip(("linear", "fractal", "natural", "lexical"), PALETTE, strict=False))
MUTED = "#C8C8C8"  # for the experts that were not chosen
PAGE = 8  # prompts in one plot
LONGEST = 72  # characters of a prompt in a title


def write(explained: list[Explained], folder: Path) -> list[Path]:
    """One plot per gate and page of prompts, as SVG and PNG; returns the paths. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    gates = len(explained[0].choices)
    written = []
    for gate in range(gates):
        for start in range(0, len(explained), PAGE):
            part = explained[start : start + PAGE]
            choices = [one.choices[gate] for one in part]
            name = "decision" + (f".layer{choices[0].layer}" if gates > 1 else "") + (f".{start + 1}" if start else "")
            figure = draw([one.prompt for one in part], choices)
            manifest.write_text(folder / f"{name}.svg", svg(figure))
            with warnings.catch_warnings(), mpl.rc_context(STYLE):
                warnings.simplefilter("ignore")  # characters that the font lacks are drawn as boxes
                figure.savefig(folder / f"{name}.png", dpi=160, bbox_inches="tight")
            written += [folder / f"{name}.svg", folder / f"{name}.png"]
    return written


def draw(prompts: list[str], choices: list[Choice]) -> Figure:
    """A row for each prompt: the terms on the left, the confidences on the right."""
    heights = [0.3 * len(choice.candidates) + 0.4 for choice in choices]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, sum(heights) + 1.0), layout="constrained")
        grid = figure.subplots(len(choices), 2, squeeze=False, width_ratios=(3, 1.25), height_ratios=heights)
        for prompt, choice, (terms, confidences) in zip(prompts, choices, grid, strict=True):
            _terms(terms, choice)
            _confidences(confidences, choice)
            terms.set_title(_shortened(prompt), loc="left", fontsize=10.5, fontweight="bold", parse_math=False)
        _share_scale([line[0] for line in grid])
        for plot in grid[:-1].flat:
            plot.tick_params(axis="x", labelbottom=False)
        needs = choices[0].kind == "needs"
        logit = "expert's logit, relative to the mean over the experts"
        grid[-1][0].set_xlabel(f"contribution to the {'log-odds that the axis is needed' if needs else logit}")
        grid[-1][1].set_xlabel("calibrated probability of need" if needs else "calibrated confidence")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(
            handles[1:] + handles[:1], labels[1:] + labels[:1], loc="outside upper left", ncols=6, frameon=False
        )
    return figure


def _shortened(prompt: str) -> str:
    text = visible(quoted(prompt))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _lines(choice: Choice) -> list[Candidate]:
    """From the bottom to the top of the plot: by rising confidence."""
    return choice.candidates[::-1]


def _terms(plot: Axes, choice: Choice) -> None:
    """Stacked bars: positive contributions to the right, negative ones to the left, and a mark at their sum.

    A contribution is a term divided by the post-hoc temperature. In a choice its mean over the experts is subtracted
    before, since the softmax depends on differences alone; in needs the terms are differences already.
    """
    lines = _lines(choice)
    right, left = [0.0] * len(lines), [0.0] * len(lines)
    for term in choice.chosen.parts:
        mean = 0.0 if choice.kind == "needs" else sum(c.parts[term] for c in lines) / len(lines)
        widths = [(c.parts[term] - mean) / choice.temperature for c in lines]
        starts = [right[i] if w > 0 else left[i] for i, w in enumerate(widths)]
        plot.barh(range(len(lines)), widths, left=starts, height=0.62, color=COLOURS.get(term, MUTED), label=term)
        right = [r + max(w, 0.0) for r, w in zip(right, widths, strict=True)]
        left = [s + min(w, 0.0) for s, w in zip(left, widths, strict=True)]
    sums = [r + s for r, s in zip(right, left, strict=True)]
    plot.plot(sums, range(len(lines)), "D", color="white", markeredgecolor="black", markersize=5, label="sum")
    plot.axvline(0.0, color="#444444", linewidth=0.8)
    plot.grid(axis="x", color="#E4E4E4", linewidth=0.7)
    plot.set_axisbelow(True)
    plot.set_yticks(range(len(lines)), [c.name for c in lines], parse_math=False)
    for label, candidate in zip(plot.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if candidate in choice.serving else "normal")
    plot.tick_params(axis="y", length=0)
    plot.spines["left"].set_visible(False)


def _confidences(plot: Axes, choice: Choice) -> None:
    lines = _lines(choice)
    colours = ["#222222" if c in choice.serving else MUTED for c in lines]
    bars = plot.barh(range(len(lines)), [c.confidence for c in lines], height=0.62, color=colours)
    plot.bar_label(bars, [percent(c.confidence) for c in lines], padding=3, fontsize=9)
    plot.set_xlim(0, 1.35)
    plot.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    plot.set_yticks([])
    plot.grid(axis="x", color="#E4E4E4", linewidth=0.7)
    plot.set_axisbelow(True)
    plot.spines["left"].set_visible(False)


def _share_scale(plots: list[Axes]) -> None:
    """The same scale for every prompt, so that lengths can be compared."""
    ends = [end for plot in plots for end in plot.get_xlim()]
    for plot in plots:
        plot.set_xlim(min(ends), max(ends))
