"""Figure 4: what each part of the gate is worth, how many experts should answer, and who answers what.

Parts are switched off in the stored gate, whose temperature is then fitted anew on rows kept back from training. The
parts that stay were trained beside those that go: a gate trained without them may do better. For the linear router,
which leans on the calibrators most, one fitted by itself stands beside it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from alignx_ds.data.rows import Row
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.gate_terms import TERMS, sum_of
from alignx_ds.runtime import console
from alignx_ds.study import drawing
from alignx_ds.study.parts import Judged, routers_alone, serving
from alignx_ds.study.subject import Subject

ALONE = "linear router by itself"
LADDER: dict[str, tuple[str, ...]] = {
    "linear router, as stored": ("linear",),
    "linear + fractal": ("linear", "fractal"),
    "linear + natural": ("linear", "natural"),
    "linear + lexical": ("linear", "lexical"),
    "fractal + natural": ("fractal", "natural"),
    "all parts": TERMS,
}
FINE_TUNING, AVERAGED = "fine-tuning alone (mixed)", "experts, no router"
METRICS = {"accuracy": "accuracy ↑", "nll": "NLL ↓", "ece": "ECE ↓", "brier": "Brier ↓"}
MOST_TYPES = 6  # of one axis's categories, the most frequent ones


def measure(subject: Subject) -> dict[str, Any]:
    """Routing and scores of each configuration and top-k; activation probabilities; query type × expert."""
    model = subject.aligned()
    judged = Judged.of(model, subject)
    experts = subject.config.expert_names
    with console.progress("configurations served", len(LADDER) + 3 + len(_counts_of(len(experts)))) as bar:
        configurations: dict[str, Any] = {
            FINE_TUNING: {"routing": None, "scores": subject.scores(subject.system("mixed"))}
        }
        bar.advance()
        with serving(model, (), len(experts)):  # no part says anything: the gates are all alike
            configurations[AVERAGED] = {"routing": None, "scores": subject.scores(model)}
        bar.advance()
        configurations[ALONE] = _alone(model, subject, judged)
        bar.advance()
        for name, parts in LADDER.items():
            with serving(model, parts, 1, judged.temperatures(parts)):
                configurations[name] = {"routing": judged.figures(parts), "scores": subject.scores(model)}
            bar.advance()
        top_k = {}
        for name, (count, soft) in _counts_of(len(experts)).items():
            with serving(model, TERMS, count, dict.fromkeys(judged.tested, 1.0) if soft else None):
                top_k[name] = {"scores": subject.scores(model), "perplexity": subject.perplexities(model)}
            bar.advance()
    return {
        "experts": experts,
        "axes": subject.axes,
        "served_top_k": subject.config.gate.top_k,
        "prompts": {"temperature fitted on": len(judged.known), "held out": len(judged.labels)},
        "configurations": configurations,
        "top_k": top_k,
        **_activations(subject, judged),
    }


def _counts_of(experts: int) -> dict[str, tuple[int, bool]]:
    """(how many experts answer, without the temperature): sure gates make one answer of all, soft ones do mix."""
    names = {count: "all" if count == experts else f"top {count}" for count in (1, 2, experts) if count <= experts}
    soft = {f"{name}, T = 1": (count, True) for count, name in names.items() if count > 1}
    return {name: (count, False) for count, name in names.items()} | soft


def _alone(model: AlignXForCausalLM, subject: Subject, judged: Judged) -> dict[str, Any]:
    """A gate that is a linear router and never was anything else."""
    routers = routers_alone(model, subject)
    with serving(model, ("linear",), 1, routers=routers):
        swapped = judged.with_linear(Judged.of(model, subject))
    with serving(model, ("linear",), 1, swapped.temperatures(("linear",)), routers):
        return {"routing": swapped.figures(("linear",)), "scores": subject.scores(model)}


def _activations(subject: Subject, judged: Judged) -> dict[str, Any]:
    """Mean probability and share of the choices of each expert: of all held-out prompts, and by type of query."""
    logits = sum_of(judged.tested[judged.lowest]).double()
    temperature = judged.temperatures(TERMS)[judged.lowest]
    raw, calibrated = logits.softmax(-1), (logits / temperature).softmax(-1)
    types = query_types(subject.held_out())
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
    """Of each (expert, row): the expert's name, and whether the row asks for harm, or else its category."""
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
    console.table("What each part of the gate is worth", ["gate", *METRICS.values(), *axes], rows)
    rows = [[k, *(f"{s['scores'][a]:.1f}" for a in axes)] for k, s in content["top_k"].items()] if axes else []
    if rows:
        console.table("Experts that answer, all parts", ["answer", *axes], rows)
    rows = [[kind, *(f"{share:.3f}" for share in seen["chosen"])] for kind, seen in content["query_types"].items()]
    console.table("Who answers what: share of the prompts", ["query", *content["experts"]], rows)


def draw(content: dict[str, Any]) -> Figure:
    """Above: the configurations' routing and scores, and top-k; below: activations, and query type × expert."""
    with drawing.styled():
        figure = drawing.figure(11.5, 7.4)
        top, bottom = drawing.stacked(figure, [1.15, 1.0])
        routing, scores, counts = top.subplots(1, 3, width_ratios=[4, 2.5, 3.4])
        _routing(routing, content)
        _scores(scores, content)
        _counts(counts, content)
        activations, types = bottom.subplots(1, 2, width_ratios=[1.0, 1.5])
        _bars(activations, content)
        _types(types, content)
        return figure


def _routing(plot: Any, content: dict[str, Any]) -> None:
    """Every column from its worst (white) to its best (dark)."""
    seen = content["configurations"]
    values = np.array([[(s["routing"] or {}).get(m, np.nan) for m in METRICS] for s in seen.values()])
    worst, best = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    shade = (values - worst) / np.maximum(best - worst, 1e-12)
    shade[:, 1:] = 1 - shade[:, 1:]  # of all but the accuracy the least is best
    texts = [["–" if np.isnan(v) else f"{v:.3f}" for v in row] for row in values]
    drawing.heat(plot, shade, list(seen), list(METRICS.values()), texts=texts, span=(0, 1.25))
    plot.set_title("a  routing of held-out prompts")


def _scores(plot: Any, content: dict[str, Any]) -> None:
    seen, axes = content["configurations"], content["axes"]
    values = np.array([[s["scores"].get(axis, np.nan) for axis in axes] for s in seen.values()])
    texts = [["–" if np.isnan(v) else f"{v:.1f}" for v in row] for row in values]
    drawing.heat(plot, values, [""] * len(seen), axes, texts=texts, span=(0, 125), colours="Greens")
    plot.set_title("b  scores, one expert answers")


def _counts(plot: Any, content: dict[str, Any]) -> None:
    """Scores where they are judged, otherwise perplexities."""
    seen, axes = content["top_k"], content["axes"]
    key = "scores" if all(axis in s["scores"] for s in seen.values() for axis in axes) else "perplexity"
    tint = drawing.colours(content["experts"])
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
        "probability_before_temperature": ("probability before temperature", drawing.QUIET),
        "probability": ("calibrated probability", drawing.LOUD),
        "chosen": ("share chosen", "#1d3b53"),
    }
    for number, (key, (label, colour)) in enumerate(kinds.items()):
        bars = plot.bar(np.arange(len(experts)) + (number - 1) * 0.27, seen[key], 0.25, color=colour, label=label)
        plot.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
    plot.set_xticks(range(len(experts)), experts)
    plot.set_ylim(0, max(max(seen[key]) for key in kinds) * 1.45)
    plot.set_ylabel("mean over held-out prompts")
    plot.legend(frameon=False, fontsize=7, loc="upper left")
    plot.set_title("d  expert activation")


def _types(plot: Any, content: dict[str, Any]) -> None:
    """Shades are probabilities before the temperature, where there is something to see; numbers are choices."""
    seen, experts = content["query_types"], content["experts"]
    soft = np.array([s["probability_before_temperature"] for s in seen.values()])
    texts = [[f"{100 * share:.0f} %" for share in s["chosen"]] for s in seen.values()]
    names = [f"{kind} ({s['prompts']})" for kind, s in seen.items()]
    picture = drawing.heat(plot, soft, names, experts, texts=texts, span=(0, 1))
    plot.figure.colorbar(picture, ax=plot, label="probability before temperature", fraction=0.05)
    plot.set_title("e  query type × expert: share of the prompts that it answers")
