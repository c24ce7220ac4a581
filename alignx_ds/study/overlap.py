"""Whether the axes have disjoint feature spaces: in what they change of the weights, and in what prompts activate.

Task vectors that point apart cancel where a merge adds them up; those that share directions overwrite each other there.
`prompt_overlap` compares harmful with harmless prompts.

Shapes: a task vector of one projection is [m, n] fp32; its left singular vectors U [m, r] are directions of the
projection's output, its right ones V [n, r] directions of its input.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from alignx_ds.experts.task_vectors import read_task_vector
from alignx_ds.runtime import console
from alignx_ds.study import plotting, prompt_overlap
from alignx_ds.study.seeds import mean
from alignx_ds.study.studied_run import StudiedRun

LEADING = 8  # singular vectors of a side, at most, that span a task vector's subspace
TITLES = {
    "cosine": "cosine of the task vectors",
    "output": "shared output directions",
    "input": "shared input directions",
}
Matrix = list[list[float]]  # [axes, axes]


def measure(studied: StudiedRun) -> dict[str, Any]:
    """The cosines and shared subspaces of every pair of axes' task vectors, and the shared subspaces of prompts."""
    directories = [studied.fine_tune(axis) for axis in studied.axes]
    names: list[tuple[int, str]] = []
    weights: list[list[Tensor]] = []  # by weight, a task vector of each axis
    for layer in studied.base.layers:
        changes = [read_task_vector(directory, layer) for directory in directories]
        common = [p for p in changes[0] if all(p in change for change in changes)]  # an adapter may change others too
        names += [(layer, p) for p in common]
        weights += [[change[p] for change in changes] for p in common]
    found = conflicts(weights, LEADING)
    by_weight = [
        {"layer": layer, "projection": p} | own for (layer, p), own in zip(names, found.pop("by_weight"), strict=True)
    ]
    shared = {"axes": studied.axes, "weights": len(weights), "rank": LEADING}
    return shared | found | {"by_weight": by_weight, "prompts": prompt_overlap.measure(studied)}


def conflicts(weights: list[list[Tensor]], rank: int) -> dict[str, Any]:
    """`cosine`, over all weights together; `output` and `input`, the means over weights of the subspaces' overlap.

    `weights` has a task vector of each axis, by weight. The overlap of two subspaces of r dimensions is ‖UᵢᵀUⱼ‖²_F / r:
    1 for the same one, 0 for orthogonal ones, and r / m on average for random ones in m dimensions (`random`).
    `by_weight` has the same of every weight alone.
    """
    by_weight = [{"cosine": _cosines(vectors)} | _shared(vectors, rank) for vectors in weights]
    found: dict[str, Any] = {
        "cosine": _cosines([torch.cat([w[i].flatten() for w in weights]) for i in range(len(weights[0]))])
    }
    for side in ("output", "input"):
        found[side] = np.mean([own[side] for own in by_weight], axis=0).tolist()
    found["random"] = {side: float(np.mean([own["random"][side] for own in by_weight])) for side in ("output", "input")}
    return found | {"by_weight": by_weight}


def _cosines(vectors: list[Tensor]) -> Matrix:
    unit = torch.nn.functional.normalize(torch.stack([vector.flatten() for vector in vectors]).double(), dim=1)
    found: Matrix = (unit @ unit.T).tolist()
    return found


def _shared(vectors: list[Tensor], rank: int) -> dict[str, Any]:
    """Of one weight's task vectors [m, n]: the overlaps of their output and input subspaces, and those at random."""
    found: dict[str, Any] = {"random": {}}
    for side in ("output", "input"):
        bases = [leading(vector if side == "output" else vector.T, rank) for vector in vectors]
        found[side] = _overlaps(bases)
        found["random"][side] = bases[0].shape[1] / bases[0].shape[0]
    return found


def leading(matrix: Tensor, rank: int) -> Tensor:
    """[m, r]: the first left singular vectors of a matrix [m, n]; r is `rank`, or less where the matrix is smaller."""
    left: Tensor = torch.linalg.svd(matrix.double(), full_matrices=False)[0]
    return left[:, :rank]


def _overlaps(bases: list[Tensor]) -> Matrix:
    return [[float((a.T @ b).square().sum()) / a.shape[1] for b in bases] for a in bases]


def show(content: dict[str, Any]) -> None:
    axes = content["axes"]
    for what, title in TITLES.items():
        rows = [[axis, *(f"{value:z.2f}" for value in line)] for axis, line in zip(axes, content[what], strict=True)]
        console.table(_title(content, what, title), ["axis", *axes], rows)
    pairs = [(i, j) for i, j in combinations_with_replacement(range(len(axes)), 2) if i < j]
    if pairs:
        i, j = min(pairs, key=lambda pair: content["cosine"][pair[0]][pair[1]])
        console.say(
            f"the task vectors that point apart most: {axes[i]} and {axes[j]}, cosine {content['cosine'][i][j]:.2f}"
        )
        _show_weights(content, pairs)
    if content["prompts"]:
        _show_prompts(content["prompts"])


def _show_weights(content: dict[str, Any], pairs: list[tuple[int, int]]) -> None:
    """A weight a line, with the means over all pairs of axes."""
    rows = []
    for own in content["by_weight"]:
        means = {what: mean(own[what][i][j] for i, j in pairs) for what in TITLES}
        cells = [f"{means['cosine']:z.2f}"]
        for side in ("output", "input"):
            cells += [f"{means[side]:.2f}", f"{own['random'][side]:.2f}"]
        rows.append([str(own["layer"]), own["projection"], *cells])
    columns = ["layer", "projection", "cosine", "shared outputs", "random", "shared inputs", "random"]
    console.table("Mean over the pairs of axes, by weight", columns, rows, texts=(1,))


def _show_prompts(content: dict[str, Any]) -> None:
    """A layer a line: every system's overlap; for comparison AlignX's, of the halves of a set and at random."""
    systems = content["systems"]
    rows = []
    for layer in systems["base"]:
        cells = [f"{systems[name][layer]['overlap']:.2f}" for name in systems]
        reference = [f"{systems['alignx'][layer][what]:.2f}" for what in ("halves", "random")]
        rows.append([layer, *cells, *reference])
    columns = ["layer", *map(plotting.label, systems), "halves of a set (AlignX)", "random (AlignX)"]
    counts = ", ".join(f"{float(count):.0f} {kind}" for kind, count in content["prompts"].items())
    console.table(f"Overlap of harmful and harmless prompts ({counts}), output of each layer", columns, rows)


def draw(content: dict[str, Any]) -> Figure:
    """Three heat maps; below them, by layer, the overlap of harmful and harmless prompts."""
    with plotting.styled():
        width = 3.2 + 1.2 * len(content["axes"])
        if not content["prompts"]:
            figure = plotting.figure(width, 3.6)
            heats(figure.subplots(1, len(TITLES), squeeze=False)[0], content)
            return figure
        figure = plotting.figure(width, 6.2)
        above, below = plotting.stacked(figure, [3.6, 2.6])
        heats(above.subplots(1, len(TITLES), squeeze=False)[0], content)
        _curves(below.subplots(), content["prompts"])
        return figure


def _curves(plot: Any, content: dict[str, Any]) -> None:
    """A system a colour: solid harmful with harmless, dashed the halves of a set, dotted random."""
    shades = dict(zip(content["systems"], ("black", "#666666", plotting.MUTED, plotting.ACCENT), strict=True))
    for name, by_layer in content["systems"].items():
        layers = list(map(int, by_layer))
        for what, line in (("overlap", "-"), ("halves", "--"), ("random", ":")):
            values = [own[what] for own in by_layer.values()]
            label = plotting.label(name) if what == "overlap" else None
            plot.plot(
                layers, values, line, color=shades[name], linewidth=1.6 if what == "overlap" else 0.8, label=label
            )
    plot.set(xlabel="decoder layer", ylabel="overlap", ylim=(0, 1.03), xticks=layers)
    plot.set_title("Harmful with harmless prompts (dashed: halves of one set; dotted: random)", fontsize=9)
    plot.legend(frameon=False, ncols=4)


def heats(plots: Any, content: dict[str, Any]) -> None:
    """The heat maps, one into each of three plots."""
    axes = content["axes"]
    for plot, (what, title) in zip(plots, TITLES.items(), strict=True):
        values = np.array(content[what])
        texts = [[f"{float(value):z.2f}".replace("0.", ".") for value in line] for line in values]
        span, colours = ((-1.0, 1.0), "RdBu") if what == "cosine" else ((0.0, 1.0), "Blues")
        plotting.heat(plot, values, axes, axes, texts=texts, span=span, colours=colours)
        plot.tick_params(axis="x", labelrotation=60)
        plot.set_title(_title(content, what, title).replace(" (", "\n("), fontsize=9)


def _title(content: dict[str, Any], what: str, title: str) -> str:
    return f"{title} (random: {content['random'][what]:.2f})" if what in content["random"] else title
