"""Figure 1a: the features of each axis's held-out prompts, before and after alignment.

A prompt's features are a gate's input (`prompt_summary`: mean, largest, smallest and last hidden state), taken from the
output of each AlignX layer, since the input of the lowest one is the same in every system.

Shapes: N prompts, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.data.user_turn import user_turn
from alignx_ds.mocae.routing_state import prompt_summary
from alignx_ds.mocae.turns import query_mask
from alignx_ds.runtime import console
from alignx_ds.study import plotting
from alignx_ds.study.cluster_indices import Labels, Points, aqi, cluster_indices
from alignx_ds.study.layer_outputs import layer_outputs
from alignx_ds.study.studied_run import SYSTEMS, StudiedRun

ALL = "all"
MOST = 250  # prompts of each axis
NEIGHBOURS = 30.0  # t-SNE's perplexity, scikit-learn's default
LABELS = {
    "silhouette": "silhouette ↑",
    "calinski_harabasz": "Calinski–Harabasz ↑",
    "dunn": "Dunn ↑",
    "davies_bouldin": "Davies–Bouldin ↓",
    "xie_beni": "Xie–Beni ↓",
    "aqi": "AQI ↑",
}


def measure(studied: StudiedRun) -> dict[str, Any]:
    """Cluster indices by grouping, layer and system; shifts and distances; the coordinates of the scatter plots.

    The distances are of all systems that the run compares, the rest is of SYSTEMS.
    """
    chosen = _chosen(studied)
    owners = [studied.held_out_rows()[i] for i in chosen]
    axes = [name for name, _ in owners]
    layers, last = studied.base.layers, studied.base.layers[-1]
    found: dict[str, dict[int, Points]] = {}
    distances: dict[str, dict[str, float]] = {}
    for system in studied.compared():
        own = features(system.load().eval(), studied, chosen)
        if system.name in SYSTEMS:
            found[system.name] = own
        distances[system.name] = distance(found["base"][last], own[last], axes)
    at_last = {name: by_layer[last] for name, by_layer in found.items()}
    return {
        "layers": layers,
        "drawn_layer": last,
        "prompts": {name: axes.count(name) for name in dict.fromkeys(axes)},
        "indices": {
            grouping: {
                str(layer): _compared({name: cluster_indices(found[name][layer][rows], labels) for name in SYSTEMS})
                for layer in layers
            }
            for grouping, (rows, labels) in _groupings(studied, chosen).items()
        },
        "moved": {name: moved(at_last["base"], at_last[name], axes) for name in SYSTEMS if name != "base"},
        "distance": {name: by_axis for name, by_axis in distances.items() if name != "base"},
        "axis_of": axes,
        "harmful": [row.harmful for _, row in owners],
        "pca": _pca(at_last, studied.config.seed),
        "tsne": {name: _tsne(points, studied.config.seed) for name, points in at_last.items()},
    }


def _compared(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By system: its indices, and its AQI, normalised by the base model's."""
    base = found["base"]
    return {name: indices | ({"aqi": aqi(indices, base)} if indices else {}) for name, indices in found.items()}


def _chosen(studied: StudiedRun) -> list[int]:
    """The indices of the first MOST held-out prompts of every expert."""
    owners = np.array([name for name, _ in studied.held_out_rows()])
    return [int(i) for name in studied.experts for i in np.flatnonzero(owners == name)[:MOST]]


def _groupings(studied: StudiedRun, chosen: list[int]) -> dict[str, tuple[NDArray[np.int64], Labels]]:
    """By name: (indices into the chosen prompts, their labels). AQI groups harmful against harmless prompts."""
    owners = [studied.held_out_rows()[i] for i in chosen]
    names = studied.experts
    by_axis = np.array([names.index(name) for name, _ in owners])
    mixed = {name for name, row in owners if row.harmful}
    of_those = np.array([i for i, (name, _) in enumerate(owners) if name in mixed], dtype=np.int64)
    harm = np.array([int(owners[i][1].harmful) for i in of_those], dtype=np.int64)
    return {"axis": (np.arange(len(owners)), by_axis), "harm": (of_those, harm)}


@torch.no_grad()
def features(model: PreTrainedModel, studied: StudiedRun, chosen: list[int]) -> dict[int, Points]:
    """By AlignX layer, [N, D]: the features of these held-out prompts at the layer's output."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in studied.base.layers}
    prompts, turn = [studied.data.routed.examples[i] for i in chosen], user_turn(studied.base.tokenizer)
    for part, outputs in layer_outputs(model, studied, studied.base.layers, prompts):
        for layer, hidden in outputs.items():
            mask = query_mask(part.input_ids, part.prompt_mask, turn)
            seen[layer].append(prompt_summary(hidden, mask).cpu())
    return {layer: torch.cat(parts).double().numpy() for layer, parts in seen.items()}


def moved(before: Points, after: Points, axes: list[str]) -> dict[str, float]:
    """By axis: its prompts' mean shift, in units of all prompts' mean distance from their centre before the shift."""
    steps = np.linalg.norm(after - before, axis=1)
    spread = float(np.linalg.norm(before - before.mean(0), axis=1).mean())
    own = np.array(axes)
    return {name: float(steps[own == name].mean()) / spread for name in dict.fromkeys(axes)}


def distance(before: Points, after: Points, axes: list[str]) -> dict[str, float]:
    """By axis, and of all prompts: the mean L2 distance of the features from the base model's, in their own units."""
    steps, own = np.linalg.norm(after - before, axis=1), np.array(axes)
    return {name: float(steps[own == name].mean()) for name in dict.fromkeys(axes)} | {ALL: float(steps.mean())}


def _pca(features_of: dict[str, Points], seed: int) -> dict[str, Any]:
    """One projection for all systems, so that shifts are visible."""
    fitted = PCA(n_components=2, random_state=seed).fit(np.concatenate(list(features_of.values())))
    shares = [round(float(share), 4) for share in fitted.explained_variance_ratio_]
    return {"explained": shares, **{name: _rounded(fitted.transform(points)) for name, points in features_of.items()}}


def _tsne(points: Points, seed: int) -> list[list[float]]:
    """One projection per system: t-SNE keeps neighbourhoods, but neither positions nor distances."""
    neighbours = min(NEIGHBOURS, (len(points) - 1) / 3)
    return _rounded(TSNE(perplexity=neighbours, init="pca", random_state=seed).fit_transform(points))


def _rounded(points: Points) -> list[list[float]]:
    return [[round(float(x), 3) for x in point] for point in points]


def show(content: dict[str, Any]) -> None:
    """The drawn layer's indices, and the shifts, as tables."""
    titles = {"axis": "Cluster indices of the axes' prompts", "harm": "Cluster indices of harmful and harmless prompts"}
    for grouping, by_layer in content["indices"].items():
        found = by_layer[str(content["drawn_layer"])]
        rows = [
            [plotting.label(name), *(f"{found[name][index]:.3f}" for index in LABELS)]
            for name in SYSTEMS
            if found[name]
        ]
        if rows:
            console.table(
                f"{titles[grouping]}, output of layer {content['drawn_layer']}", ["system", *LABELS.values()], rows
            )
    axes = list(content["prompts"])
    rows = [[plotting.label(name), *(f"{m[axis]:.2f}" for axis in axes)] for name, m in content["moved"].items()]
    console.table("Mean shift of the features from the base model's, over their spread there", ["system", *axes], rows)
    columns = [*axes, ALL]
    rows = [
        [plotting.label(name), *(f"{d[column]:.4g}" for column in columns)] for name, d in content["distance"].items()
    ]
    console.table("Mean L2 distance of the features from the base model's", ["system", *columns], rows)


def draw(content: dict[str, Any]) -> Figure:
    """PCA and t-SNE scatter plots, a column per system; below them, the indices and the shifts."""
    with plotting.styled():
        figure = plotting.figure(13.0, 7.8)
        scatters, bars = plotting.stacked(figure, [5.2, 2.4])
        panels = scatters.subplots(2, len(SYSTEMS), squeeze=False)
        for row, kind in enumerate(("pca", "tsne")):
            for column, name in enumerate(SYSTEMS):
                _scatter(panels[row][column], content, kind, name)
                if row == 0:
                    panels[row][column].set_title(plotting.label(name))
                elif name in content["distance"]:
                    panels[row][column].set_xlabel(f"mean L2 distance to base: {content['distance'][name][ALL]:.1f}")
        explained = " + ".join(f"{share:.0%}" for share in content["pca"]["explained"])
        panels[0][0].set_ylabel(f"PCA, one for all ({explained})")
        panels[1][0].set_ylabel("t-SNE, one per system")
        _share_limits(list(panels[0]))
        handles, labels = panels[0][0].get_legend_handles_labels()
        scatters.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, markerscale=2.2)
        *plots, last = bars.subplots(1, len(LABELS) + 1)
        _bars(plots, content)
        _moves(last, content)
        bars.legend(*plots[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
        return figure


def _scatter(plot: Any, content: dict[str, Any], kind: str, name: str) -> None:
    points, axes = np.array(content[kind][name]), np.array(content["axis_of"])
    harmful = np.array(content["harmful"])
    look = {"alpha": 0.65, "linewidths": 0, "rasterized": True}
    for axis, colour in plotting.colours(list(content["prompts"])).items():
        own = points[(axes == axis) & ~harmful]
        plot.scatter(own[:, 0], own[:, 1], s=8, color=colour, label=axis, **look)
        harm = points[(axes == axis) & harmful]
        if len(harm):
            plot.scatter(harm[:, 0], harm[:, 1], s=14, color="#5c2400", marker="^", label=f"{axis}: harmful", **look)
    plot.set_xticks([])
    plot.set_yticks([])
    plot.spines[["top", "right"]].set_visible(True)
    plot.spines[:].set_color("#cccccc")


def _share_limits(plots: list[Any]) -> None:
    for get, put in (("get_xlim", "set_xlim"), ("get_ylim", "set_ylim")):
        edges = [edge for plot in plots for edge in getattr(plot, get)()]
        for plot in plots:
            getattr(plot, put)(min(edges), max(edges))


def _bars(plots: Any, content: dict[str, Any]) -> None:
    layer = str(content["drawn_layer"])
    for plot, (index, label) in zip(plots, LABELS.items(), strict=True):
        for offset, grouping, colour in ((-0.2, "axis", plotting.ACCENT), (0.2, "harm", "#d9a441")):
            found = content["indices"][grouping][layer]
            values = [found[name].get(index) or np.nan for name in SYSTEMS]
            title = {"axis": "clusters: axes", "harm": "clusters: harmful, harmless"}[grouping]
            plot.bar(np.arange(len(SYSTEMS)) + offset, values, 0.38, color=colour, label=title)
        plot.set_title(label)
        plot.set_xticks(range(len(SYSTEMS)), [plotting.label(name) for name in SYSTEMS], rotation=35, ha="right")
        if index == "calinski_harabasz" and any(patch.get_height() > 0 for patch in plot.patches):  # of one axis: none
            plot.set_yscale("log")


def _moves(plot: Any, content: dict[str, Any]) -> None:
    systems, axes = list(content["moved"]), list(content["prompts"])
    width = 0.8 / len(axes)
    for number, (axis, colour) in enumerate(plotting.colours(axes).items()):
        places = np.arange(len(systems)) + (number - (len(axes) - 1) / 2) * width
        plot.bar(places, [content["moved"][name].get(axis, 0.0) for name in systems], width * 0.92, color=colour)
    plot.set_title("shift / spread")
    plot.set_xticks(range(len(systems)), [plotting.label(name) for name in systems], rotation=35, ha="right")
