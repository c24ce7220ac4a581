"""Steering: the base model with h + α(μ_axis − μ_base) at one layer, for every axis, beside AlignX.

μ_axis is the specialist's mean hidden state at the layer's output, over the tokens of its axis's training prompts;
μ_base is the base model's, on the same tokens. So α = 1 shifts every token as far as the specialist shifts these on
average, and no weight is changed. Zou et al. 2023 (representation engineering, arXiv 2310.01405); a vector added at
every position as in Rimsky et al. 2024 (arXiv 2312.06681).

Shapes: d is the model's hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignx_ds.data.encode import Example
from alignx_ds.models.decoder_outputs import changed_output
from alignx_ds.runtime import console
from alignx_ds.study import plotting
from alignx_ds.study.layer_outputs import layer_outputs
from alignx_ds.study.seeds import mean
from alignx_ds.study.studied_run import StudiedRun

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)  # α
MOST = 256  # prompts of an axis
Scores = dict[str, float]  # by axis, 0–100


def measure(studied: StudiedRun) -> dict[str, Any]:
    """Scores of the base model, of AlignX, and of every axis's steered model by layer and α."""
    base = studied.base_model()
    alone = studied.scores(base)
    curves: dict[str, dict[str, list[Scores]]] = {}
    for axis in studied.scored_axes:
        prompts = [_prompt(example) for example in studied.data.injected[axis][:MOST]]
        after, before = (means(model, studied, prompts) for model in (studied.fine_tuned(axis), base))
        curves[axis] = {}
        for layer in _layers(studied):
            points = []
            for strength in STRENGTHS:
                with steered(studied.base.table.decoder_layers(base)[layer], strength * (after[layer] - before[layer])):
                    points.append(studied.scores(base))
            curves[axis][str(layer)] = points
    aligned = studied.scores(studied.aligned())
    return {"strengths": STRENGTHS, "base": alone, "alignx": aligned, "steered": curves}


def _layers(studied: StudiedRun) -> list[int]:
    """The lowest, the middle and the last AlignX layer."""
    layers = studied.base.layers
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]})


def _prompt(example: Example) -> Example:
    return Example(example.ids[: example.prompt_length], example.prompt_length)


@torch.no_grad()
def means(model: PreTrainedModel, studied: StudiedRun, prompts: list[Example]) -> dict[int, Tensor]:
    """By layer of `_layers`, [d] fp32: the mean of the layer's output over all tokens of the prompts."""
    sums = {layer: torch.zeros(()) for layer in _layers(studied)}
    for part, outputs in layer_outputs(model, studied, list(sums), prompts):
        for layer, hidden in outputs.items():
            sums[layer] = sums[layer] + hidden[part.attention_mask.bool()].float().sum(0).cpu()
    tokens = sum(len(prompt.ids) for prompt in prompts)
    return {layer: total / tokens for layer, total in sums.items()}


def steered(layer: nn.Module, vector: Tensor) -> AbstractContextManager[None]:
    """Add a vector [d] to the layer's output, at every position of prompt and answer."""
    return changed_output(layer, lambda hidden: hidden + vector.to(hidden))


def others(scores: Scores, axis: str) -> float:
    """The mean score of the other axes; of a single axis, its own."""
    return mean([score for name, score in scores.items() if name != axis] or [scores[axis]])


def best(content: dict[str, Any], axis: str) -> tuple[str, float, Scores]:
    """(layer, α, scores) of the steered model with the best mean of its own axis's score and the others' mean."""
    points = [
        (layer, strength, scores)
        for layer, curve in content["steered"][axis].items()
        for strength, scores in zip(content["strengths"], curve, strict=True)
    ]
    return max(points, key=lambda point: point[2][axis] + others(point[2], axis))


def show(content: dict[str, Any]) -> None:
    rows = []
    for axis in content["steered"]:
        layer, strength, scores = best(content, axis)
        for name, found in (("base", content["base"]), (f"steered, layer {layer}, α {strength:g}", scores)):
            rows.append([axis, name, f"{found[axis]:.1f}", f"{others(found, axis):.1f}"])
        rows.append([axis, "AlignX", f"{content['alignx'][axis]:.1f}", f"{others(content['alignx'], axis):.1f}"])
    columns = ["axis", "system", "its score", "the other axes' mean"]
    console.table("Steering at the best layer and α", columns, rows, texts=(0, 1))


def draw(content: dict[str, Any]) -> Figure:
    """An axis a plot: its score against the other axes' mean, as α grows from the base model on."""
    axes = list(content["steered"])
    with plotting.styled():
        figure = plotting.figure(3.1 * len(axes), 3.2)
        for plot, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
            curves = content["steered"][axis].items()
            for (layer, curve), shade in zip(curves, ("#b8c4d0", "#6f94b8", plotting.ACCENT), strict=False):
                points = [content["base"], *curve]
                xs, ys = [others(p, axis) for p in points], [p[axis] for p in points]
                plot.plot(xs, ys, "o-", color=shade, markersize=3, label=f"layer {layer}")
            base, ours = content["base"], content["alignx"]
            plot.plot(others(base, axis), base[axis], "s", color="black", label="base")
            plot.plot(others(ours, axis), ours[axis], "*", color="#c0392b", markersize=12, label="AlignX")
            plot.set(xlabel="mean score of the other axes", ylabel=f"{axis}'s score", title=axis)
            plot.set(xlim=(-5, 105), ylim=(-5, 105))
        figure.legend(*plot.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        return figure
