"""Sensitivity: AlignX's scores against settings that a finished model can change without training, each by itself.

How many experts serve, the gate's temperature, the weights λ of its calibrators, and two scales γ: of the experts'
change of the FFN, and of the output calibration's change of the output. The model was trained with its own settings,
and no temperature is fitted again, so a curve says how much a setting matters to this model, not which is the best one
to train with. For that, runs are compared (sensitivity_runs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from alignx_ds.mocae.attention import routed_linears
from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.gate import CalibratedGate
from alignx_ds.mocae.layer import AlignXLayer, alignx_layers, gates_of, output_calibrations
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.runtime import console
from alignx_ds.study import plotting
from alignx_ds.study.seeds import mean
from alignx_ds.study.studied_run import StudiedRun

WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)  # of a term of the gate, relative to the run's
TEMPERATURES = (0.25, 1.0, 4.0, 16.0, 64.0)  # likewise
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
SYMBOLS = {"fractal": "λ₁, fractal", "natural": "λ₂, natural", "lexical": "λ₃, lexical"}


@dataclass(frozen=True)
class Setting:
    """A setting's values, that of the run among them, and how to give one to a model."""

    name: str
    own: float
    values: Sequence[float]
    give: Callable[[AlignXForCausalLM, float], None]


def settings_of(model: AlignXForCausalLM) -> Iterator[Setting]:
    """Those that the model has. All but the number of experts are relative to its own."""
    gate, experts = model.config.gate_settings(), len(model.config.experts)
    most = experts - 1 if gate.kind == "needs" else experts
    yield Setting("k, experts that serve", gate.chosen(experts), range(1, most + 1), serve)
    yield Setting("T of the gate, k = all", 1.0, TEMPERATURES, partial(soften, most=most))
    weights = {name: getattr(gate, name) for name in SYMBOLS} | gate.more
    for name in (name for name, weight in weights.items() if weight > 0):
        yield Setting(f"{SYMBOLS.get(name, name)} weight", 1.0, WEIGHTS, partial(weigh, term=name))
    yield Setting("γ, the experts' change", 1.0, SCALES, scale_experts)
    if output_calibrations(model):
        yield Setting("γ, the output calibration", 1.0, SCALES, scale_calibrations)


def serve(model: AlignXForCausalLM, count: float) -> None:
    parts: list[CalibratedGate | AlignXLayer] = [*gates_of(model).values(), *alignx_layers(model)]
    for part in parts:
        part.settings = replace(part.settings, top_k=int(count))


@torch.no_grad()
def soften(model: AlignXForCausalLM, factor: float, most: int) -> None:
    """With one expert a temperature changes nothing, so `most` serve."""
    serve(model, most)
    for gate in gates_of(model).values():
        gate.calibration_temperature.mul_(factor)


def weigh(model: AlignXForCausalLM, factor: float, term: str) -> None:
    for gate in gates_of(model).values():
        own = gate.settings
        if term in own.more:
            gate.settings = replace(own, more=own.more | {term: factor * own.more[term]})
        else:
            gate.settings = replace(own, **{term: factor * getattr(own, term)})


@torch.no_grad()
def scale_experts(model: AlignXForCausalLM, factor: float) -> None:
    """W + up · down of every projection and axis becomes W + factor · up · down."""
    for layer in alignx_layers(model):
        if isinstance(layer.mixture, FusedMixture):
            layer.mixture.up_in.mul_(factor)
            layer.mixture.up_out.mul_(factor)
    for module in routed_linears(model):
        module.experts_up.mul_(factor)


@torch.no_grad()
def scale_calibrations(model: AlignXForCausalLM, factor: float) -> None:
    """ỹ = y + R·(…) becomes y + factor · R·(…)."""
    for calibration in output_calibrations(model):
        calibration.reinjection.mul_(factor)


def measure(studied: StudiedRun) -> dict[str, Any]:
    """By setting: its value in the run, the values, and AlignX's scores by axis with each of them."""
    model = studied.aligned()
    as_it_is, settings = studied.scores(model), list(settings_of(model))
    found: dict[str, Any] = {}
    with console.progress("settings", sum(len(setting.values) for setting in settings)) as bar:
        for setting in settings:
            points = []
            for value in setting.values:
                model = studied.aligned()
                setting.give(model, value)
                points.append(studied.scores(model))
                bar.advance()
            found[setting.name] = {"own": setting.own, "values": list(setting.values), "scores": points}
    return {"axes": studied.scored_axes, "as_it_is": as_it_is, "settings": found}


def show(content: dict[str, Any]) -> None:
    axes = content["axes"]
    for name, found in content["settings"].items():
        rows = [
            [f"{value:g}", *(f"{score:.1f}" for score in (*(point[axis] for axis in axes), mean(point.values())))]
            for value, point in zip(found["values"], found["scores"], strict=True)
        ]
        relative = "" if isinstance(found["own"], int) else ", relative to the run's"
        console.table(f"{name}{relative}", ["value", *axes, "avg"], rows)


def draw(content: dict[str, Any]) -> Figure:
    """A setting a plot: each axis's score and their mean; the run's own value is dotted."""
    settings, axes = content["settings"], content["axes"]
    columns = min(4, len(settings))
    with plotting.styled():
        figure = plotting.figure(2.9 * columns, 2.6 * -(-len(settings) // columns))
        plots = figure.subplots(-(-len(settings) // columns), columns, squeeze=False, sharey=True).flatten()
        for plot, (name, found) in zip(plots, settings.items(), strict=False):
            for axis, colour in plotting.colours(axes).items():
                scores = [point[axis] for point in found["scores"]]
                plot.plot(range(len(scores)), scores, "o-", color=colour, markersize=3, linewidth=1, label=axis)
            means = [mean(point.values()) for point in found["scores"]]
            plot.plot(range(len(means)), means, "o-", color="black", markersize=3.5, linewidth=1.8, label="avg")
            plot.axvline(found["values"].index(found["own"]), color=plotting.MUTED, linestyle=":", linewidth=1)
            plot.set_xticks(range(len(means)), [f"{value:g}" for value in found["values"]])
            plot.set(title=name, ylim=(-3, 103))
        for plot in plots[len(settings) :]:
            plot.set_visible(False)
        figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        figure.supylabel("score of AlignX", fontsize=9)
        return figure
