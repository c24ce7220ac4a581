"""Figure 4: what each part of the gate contributes, how many experts should answer, and which expert answers what.

Parts are switched off in the stored gate, and its temperature is fitted again on the calibration split. The remaining
parts were trained beside the others, so a gate trained without those might do better. For the linear router, which
depends on the calibrators most, the study also has one that was fitted alone.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from alignx_ds.data.rows import Row
from alignx_ds.mocae.gate import TERMS
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.gate_terms import sum_of
from alignx_ds.runtime import console
from alignx_ds.study import plotting
from alignx_ds.study.gate_parts import GateTerms, gate_with, linear_routers
from alignx_ds.study.studied_run import StudiedRun

ALONE = "linear router, fitted alone"
LADDER: dict[str, tuple[str, ...]] = {
    "linear router, as stored": ("linear",),
    "linear + fractal": ("linear", "fractal"),
    "linear + natural": ("linear", "natural"),
    "linear + lexical": ("linear", "lexical"),
    "fractal + natural": ("fractal", "natural"),
}
ALL = "all parts"
FINE_TUNING, AVERAGED = "mixed fine-tuning, no experts", "equal weights, no router"
METRICS = {"accuracy": "accuracy ↑", "nll": "NLL ↓", "ece": "ECE ↓", "brier": "Brier ↓"}
MOST_TYPES = 6  # categories of one axis that get a row of their own: the most frequent ones


def ladder(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The combinations of a gate's parts that are measured; `names` are all of them, those of `gate.more` last."""
    more = {f"linear + {name}": ("linear", name) for name in names if name not in TERMS}
    return LADDER | more | {ALL: names}


def measure(studied: StudiedRun) -> dict[str, Any]:
    """Routing metrics and scores by gate configuration and by top-k; expert activation, in all and by type of query."""
    model = studied.aligned()
    terms = GateTerms.of(model, studied)
    experts, combinations = studied.experts, ladder(terms.names)
    with console.progress("gate configurations", len(combinations) + 3 + len(_counts_of(len(experts)))) as bar:
        configurations: dict[str, Any] = {
            FINE_TUNING: {"routing": None, "scores": studied.scores(studied.system("mixed"))}
        }
        bar.advance()
        with gate_with(model, (), len(experts)):  # without any part all gates are equal
            configurations[AVERAGED] = {"routing": None, "scores": studied.scores(model)}
        bar.advance()
        configurations[ALONE] = _alone(model, studied, terms)
        bar.advance()
        for name, parts in combinations.items():
            with gate_with(model, parts, 1, terms.temperatures(parts)):
                configurations[name] = {"routing": terms.metrics(parts), "scores": studied.scores(model)}
            bar.advance()
        top_k = {}
        for name, (count, soft) in _counts_of(len(experts)).items():
            with gate_with(model, terms.names, count, dict.fromkeys(terms.held_out, 1.0) if soft else None):
                top_k[name] = {"scores": studied.scores(model), "perplexity": studied.perplexities(model)}
            bar.advance()
    return {
        "experts": experts,
        "axes": studied.axes,
        "served_top_k": studied.config.gate.top_k,
        "prompts": {"temperature fitted on": len(terms.calibration_labels), "held out": len(terms.held_out_labels)},
        "configurations": configurations,
        "top_k": top_k,
        **_activations(studied, terms),
    }


def _counts_of(experts: int) -> dict[str, tuple[int, bool]]:
    """By name: how many experts answer, and whether T = 1. With the fitted temperature one gate may take all weight."""
    names = {count: "all" if count == experts else f"top {count}" for count in (1, 2, experts) if count <= experts}
    soft = {f"{name}, T = 1": (count, True) for count, name in names.items() if count > 1}
    return {name: (count, False) for count, name in names.items()} | soft


def _alone(model: AlignXForCausalLM, studied: StudiedRun, terms: GateTerms) -> dict[str, Any]:
    """A gate that is nothing but a linear router, fitted as such."""
    routers = linear_routers(model, studied)
    with gate_with(model, ("linear",), 1, routers=routers):
        fitted = terms.with_linear(GateTerms.of(model, studied))
    with gate_with(model, ("linear",), 1, fitted.temperatures(("linear",)), routers):
        return {"routing": fitted.metrics(("linear",)), "scores": studied.scores(model)}


def _activations(studied: StudiedRun, terms: GateTerms) -> dict[str, Any]:
    """Each expert's mean probability and share of the choices: over all held-out prompts, and by type of query."""
    logits = sum_of(terms.held_out[terms.lowest]).double()
    temperature = terms.temperatures(terms.names)[terms.lowest]
    raw, calibrated = logits.softmax(-1), (logits / temperature).softmax(-1)
    types = query_types(studied.held_out_rows())
    rows = {kind: [i for i, t in enumerate(types) if t == kind] for kind in dict.fromkeys(types)}
    return {
        "temperature": temperature,
        "activation": {
            "probability": _mean(calibrated),
            "probability_before_temperature": _mean(raw),
            "chosen": _mean(_one_hot(calibrated)),
        },
        "query_types": {
            kind: {
                "prompts": len(at),
                "chosen": _mean(_one_hot(calibrated[at])),
                "probability": _mean(calibrated[at]),
                "probability_before_temperature": _mean(raw[at]),
            }
            for kind, at in rows.items()
        },
    }


def query_types(owned: list[tuple[str, Row]]) -> list[str]:
    """The type of each (expert, row): the expert's name with harmful or benign, or else with the row's category."""
    harmed = {name for name, row in owned if row.harmful}
    tally = Counter((name, row.category) for name, row in owned if row.category)
    frequent = {
        key
        for name in {n for n, _ in tally}
        for key in sorted((k for k in tally if k[0] == name), key=lambda k: -tally[k])[:MOST_TYPES]
    }

    def kind(name: str, row: Row) -> str:
        if name in harmed:
            return f"{name}: {'harmful' if row.harmful else 'benign'}"
        if not row.category:
            return name
        return f"{name}: {row.category if (name, row.category) in frequent else 'other'}"

    return [kind(name, row) for name, row in owned]


def _mean(p: Tensor) -> list[float]:
    return [float(x) for x in p.double().mean(0)]


def _one_hot(p: Tensor) -> Tensor:
    return (p == p.max(-1, keepdim=True).values).double()


def show(content: dict[str, Any]) -> None:
    axes = [axis for axis in content["axes"] if axis in content["configurations"][FINE_TUNING]["scores"]]
    rows = []
    for name, seen in content["configurations"].items():
        routing = [f"{seen['routing'][m]:.4f}" for m in METRICS] if seen["routing"] else ["–"] * len(METRICS)
        rows.append([name, *routing, *(f"{seen['scores'][axis]:.1f}" for axis in axes)])
    console.table("Routing and scores by parts of the gate", ["gate", *METRICS.values(), *axes], rows)
    rows = [[k, *(f"{s['scores'][a]:.1f}" for a in axes)] for k, s in content["top_k"].items()] if axes else []
    if rows:
        console.table(
            "Scores by the number of experts that answer, with all parts of the gate", ["experts", *axes], rows
        )
    rows = [[kind, *(f"{share:.3f}" for share in seen["chosen"])] for kind, seen in content["query_types"].items()]
    console.table("Share of the prompts that each expert answers", ["type of prompt", *content["experts"]], rows)


def draw(content: dict[str, Any]) -> Figure:
    """Above: routing and scores by configuration, and scores by top-k; below: activation, in all and by query type."""
    with plotting.styled():
        figure = plotting.figure(11.5, 7.4)
        top, bottom = plotting.stacked(figure, [1.15, 1.0])
        routing, scores, counts = top.subplots(1, 3, width_ratios=[4, 2.5, 3.4])
        _routing(routing, content)
        _scores(scores, content)
        _counts(counts, content)
        activations, types = bottom.subplots(1, 2, width_ratios=[1.0, 1.5])
        _bars(activations, content)
        _types(types, content)
        return figure


def _routing(plot: Any, content: dict[str, Any]) -> None:
    """Each column is shaded from its worst value (white) to its best (dark)."""
    seen = content["configurations"]
    values = np.array([[(s["routing"] or {}).get(m, np.nan) for m in METRICS] for s in seen.values()])
    worst, best = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    shade = (values - worst) / np.maximum(best - worst, 1e-12)
    shade[:, 1:] = 1 - shade[:, 1:]  # except for the accuracy, lower is better
    texts = [["–" if np.isnan(v) else f"{v:.3f}" for v in row] for row in values]
    plotting.heat(plot, shade, list(seen), list(METRICS.values()), texts=texts, span=(0, 1.25))
    plot.set_title("a  routing of held-out prompts")


def _scores(plot: Any, content: dict[str, Any]) -> None:
    seen, axes = content["configurations"], content["axes"]
    values = np.array([[s["scores"].get(axis, np.nan) for axis in axes] for s in seen.values()])
    texts = [["–" if np.isnan(v) else f"{v:.1f}" for v in row] for row in values]
    plotting.heat(plot, values, [""] * len(seen), axes, texts=texts, span=(0, 125), colours="Greens")
    plot.set_title("b  scores, top 1")


def _counts(plot: Any, content: dict[str, Any]) -> None:
    """Scores, or perplexities when an axis has no score."""
    seen, axes = content["top_k"], content["axes"]
    key = "scores" if all(axis in s["scores"] for s in seen.values() for axis in axes) else "perplexity"
    tint = plotting.colours(content["experts"])
    width = 0.8 / len(axes)
    for number, axis in enumerate(axes):
        places = np.arange(len(seen)) + (number - (len(axes) - 1) / 2) * width
        bars = plot.bar(
            places, [s[key].get(axis, np.nan) for s in seen.values()], width * 0.92, color=tint[axis], label=axis
        )
        plot.bar_label(bars, fmt="%.0f" if key == "scores" else "%.2f", fontsize=6, padding=1)
    plot.set_xticks(range(len(seen)), [name.replace(", ", "\n") for name in seen])
    if key == "scores":
        plot.set_ylim(0, 128)
        plot.set_yticks(range(0, 101, 20))
    plot.legend(frameon=False, fontsize=7, ncols=len(axes), loc="upper center", columnspacing=0.8, handlelength=1.0)
    plot.set_title(f"c  {key}, by top-k")


def _bars(plot: Any, content: dict[str, Any]) -> None:
    seen, experts = content["activation"], content["experts"]
    kinds = {
        "probability_before_temperature": ("probability before temperature", plotting.MUTED),
        "probability": ("calibrated probability", plotting.ACCENT),
        "chosen": ("share chosen", "#1d3b53"),
    }
    for number, (key, (label, colour)) in enumerate(kinds.items()):
        bars = plot.bar(np.arange(len(experts)) + (number - 1) * 0.27, seen[key], 0.25, color=colour, label=label)
        plot.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
    plotting.name_columns(plot, experts)
    plot.set_ylim(0, max(max(seen[key]) for key in kinds) * 1.45)
    plot.set_ylabel("mean over held-out prompts")
    plot.legend(frameon=False, fontsize=7, loc="upper left")
    plot.set_title("d  expert activation")


def _types(plot: Any, content: dict[str, Any]) -> None:
    """Numbers are shares of the choices; shades are mean probabilities before the temperature, which vary more."""
    seen, experts = content["query_types"], content["experts"]
    soft = np.array([s["probability_before_temperature"] for s in seen.values()])
    texts = [[f"{100 * share:.0f} %" for share in s["chosen"]] for s in seen.values()]
    names = [f"{kind} ({s['prompts']})" for kind, s in seen.items()]
    picture = plotting.heat(plot, soft, names, experts, texts=texts, span=(0, 1))
    plot.figure.colorbar(picture, ax=plot, label="probability before temperature", fraction=0.05)
    plot.set_title("e  share of each type of prompt that an expert answers")
