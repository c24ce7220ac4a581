"""How far the axes' task vectors conflict: their cosines, and how far their leading directions coincide.

Task vectors that point apart cancel where a merge adds them up; those that share directions overwrite each other there.

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
from alignx_ds.study import plotting
from alignx_ds.study.studied_run import StudiedRun

LEADING = 8  # singular vectors of a side, at most, that span a task vector's subspace
TITLES = {
    "cosine": "cosine of the task vectors",
    "output": "shared output directions",
    "input": "shared input directions",
}
Matrix = list[list[float]]  # [axes, axes]


def measure(studied: StudiedRun) -> dict[str, Any]:
    """Every pair of axes: the cosine of their task vectors, and the overlap of their leading subspaces."""
    directories = [studied.fine_tune(axis) for axis in studied.axes]
    weights: list[list[Tensor]] = []  # by weight, a task vector of each axis
    for layer in studied.base.layers:
        changes = [read_task_vector(directory, layer) for directory in directories]
        common = [p for p in changes[0] if all(p in change for change in changes)]  # an adapter may change others too
        weights += [[change[p] for change in changes] for p in common]
    return {"axes": studied.axes, "weights": len(weights), "rank": LEADING} | conflicts(weights, LEADING)


def conflicts(weights: list[list[Tensor]], rank: int) -> dict[str, Any]:
    """`cosine`, over all weights together; `output` and `input`, the means over weights of the subspaces' overlap.

    `weights` has a task vector of each axis, by weight. The overlap of two subspaces of r dimensions is ‖UᵢᵀUⱼ‖²_F / r:
    1 for the same one, 0 for orthogonal ones, and r / m on average for random ones in m dimensions (`random`).
    """
    whole = torch.stack([torch.cat([w[i].flatten() for w in weights]) for i in range(len(weights[0]))]).double()
    unit = torch.nn.functional.normalize(whole, dim=1)
    found: dict[str, Any] = {"cosine": (unit @ unit.T).tolist(), "random": {}}
    for side, of in (("output", 0), ("input", 1)):
        spans = [[leading(vector if of == 0 else vector.T, rank) for vector in vectors] for vectors in weights]
        found[side] = np.mean([_overlaps(bases) for bases in spans], axis=0).tolist()
        found["random"][side] = float(np.mean([bases[0].shape[1] / bases[0].shape[0] for bases in spans]))
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
        rows = [[axis, *(f"{value:.2f}" for value in line)] for axis, line in zip(axes, content[what], strict=True)]
        console.table(_title(content, what, title), ["axis", *axes], rows)
    pairs = [(i, j) for i, j in combinations_with_replacement(range(len(axes)), 2) if i < j]
    if pairs:
        i, j = min(pairs, key=lambda pair: content["cosine"][pair[0]][pair[1]])
        console.say(
            f"the task vectors that point apart most: {axes[i]} and {axes[j]}, cosine {content['cosine'][i][j]:.2f}"
        )


def draw(content: dict[str, Any]) -> Figure:
    """Three heat maps."""
    with plotting.styled():
        figure = plotting.figure(3.2 + 1.2 * len(content["axes"]), 3.6)
        heats(figure.subplots(1, len(TITLES), squeeze=False)[0], content)
        return figure


def heats(plots: Any, content: dict[str, Any]) -> None:
    """The heat maps, one into each of three plots."""
    axes = content["axes"]
    for plot, (what, title) in zip(plots, TITLES.items(), strict=True):
        values = np.array(content[what])
        texts = [[f"{value:.2f}".replace("0.", ".") for value in line] for line in values]
        span, colours = ((-1.0, 1.0), "RdBu") if what == "cosine" else ((0.0, 1.0), "Blues")
        plotting.heat(plot, values, axes, axes, texts=texts, span=span, colours=colours)
        plot.tick_params(axis="x", labelrotation=60)
        plot.set_title(_title(content, what, title), fontsize=9)


def _title(content: dict[str, Any], what: str, title: str) -> str:
    return f"{title} (random: {content['random'][what]:.2f})" if what in content["random"] else title
