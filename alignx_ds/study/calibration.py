"""Figure 5: how far the confidence of the router and of the answers can be believed, before and after a temperature.

ECE is without a temperature. ECE-t is with the one that was fitted on questions asked without examples (Guo et al.
2017); "refitted" is fitted on questions with as many examples as the ones that are judged. Examples are training rows
of the question's own axis: they tell the router the axis, and make the prompt unlike all that it was fitted on.

The answers' confidence is the softmax of the log-probabilities of the best answer and the incorrect ones, as MC1 has
them; rows without incorrect answers take no part. The router's temperature is fitted on the rows kept back from stage
2. The answers' can't be: stage 1 has learned those answers. It is fitted on one half of the held-out rows and judged on
the other, and the other way round.

Shapes: N rows, E experts or answers to choose from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.likelihood import likelihoods
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.metrics import BINS, router_metrics
from alignx_ds.routing.temperature import fit_temperature
from alignx_ds.runtime import console
from alignx_ds.study import drawing
from alignx_ds.study.shots import Shots
from alignx_ds.study.subject import SYSTEMS, Subject

COUNTS = (0, 1, 3)  # examples in the prompt
NEVER = -1e9  # the logit of an answer that a question with fewer of them does not have
Owned = list[tuple[str, Row]]
TELLING = 0.02  # of the rows: bins with fewer say little
AFTER = {"none": "before", "own": "with its own temperature", "refitted": "temperature refitted"}


def measure(subject: Subject) -> dict[str, Any]:
    """By number of examples: the router's figures, and every system's multiple choice."""
    training = subject.training()
    pools = {name: [row for row in rows if row.response] for name, (rows, _) in training.items()}
    back = [(name, row) for name, (_, rows) in training.items() for row in rows]
    limit = int(getattr(subject.base.config, "max_position_embeddings", 0) or subject.config.model.max_length)
    shots = Shots(subject.base.tokenizer, subject.config.seed, limit, pools)
    asked = of_choice(subject.held_out())
    groups = {count: _answers(asked, shots, count) for count in COUNTS}
    answers: dict[str, Any] = {}
    with console.progress("calibration", (1 + len(SYSTEMS)) * len(COUNTS)) as bar:
        for name in SYSTEMS:
            model = subject.system(name)
            if name == "alignx":
                assert isinstance(model, AlignXForCausalLM)
                router = _router(model, subject, shots, back, bar.advance)
            if len(asked) > 1:
                answers[name] = _crossed({count: _choices(model, subject, g) for count, g in groups.items()}, asked)
            bar.advance(by=len(COUNTS))
    return {
        "examples": list(COUNTS),
        "bins": BINS,
        "rows": {
            "router": {"kept back": len(back), "held out": len(subject.held_out())},
            "answers": {"held out": len(asked)},
        },
        "router": router,
        "answers": answers,
    }


def of_choice(owned: Owned) -> Owned:
    """Rows of the axes that have a best answer and incorrect ones beside it."""
    return [(name, row) for name, row in owned if row.response and row.incorrect and name != "generalist"]


def _router(model: AlignXForCausalLM, subject: Subject, shots: Shots, back: Owned, advance: Any) -> dict[str, Any]:
    """The lowest gate's, as in the run's report."""
    names, lowest = subject.config.expert_names, min(gates_of(model))
    found, own = {}, 0.0
    for count in COUNTS:
        logits, labels = [], []
        for owned in (back, subject.held_out()):
            examples = [shots.encoded(row, shots.examples(name, row, count), ())[0] for name, row in owned]
            rows = LabelledExamples(examples, [names.index(name) for name, _ in owned])
            logits.append(sum_of(gate_terms(model, rows, subject.pad_id, subject.batch)[lowest]))
            labels.append(torch.tensor(rows.experts))
        refitted = fit_temperature(logits[0], labels[0])
        own = own or refitted
        found[str(count)] = calibrated(
            logits[1], labels[1], everywhere(labels[1], own), everywhere(labels[1], refitted)
        )
        advance()
    return found


def _answers(owned: Owned, shots: Shots, count: int) -> list[list[Example]]:
    """Every row's prompt with each of its answers, the best one first."""
    return [shots.encoded(row, shots.examples(name, row, count), (row.response, *row.incorrect)) for name, row in owned]


def _choices(model: PreTrainedModel, subject: Subject, groups: list[list[Example]]) -> Tensor:
    """[N, E]: the log-probability of each answer."""
    flat = iter(likelihoods(model, [e for group in groups for e in group], subject.pad_id, subject.batch))
    logits = torch.full((len(groups), max(map(len, groups))), NEVER, dtype=torch.float64)
    for line, group in enumerate(groups):
        logits[line, : len(group)] = torch.tensor([next(flat).log_probability for _ in group], dtype=torch.float64)
    return logits


def _crossed(found: dict[int, Tensor], asked: Owned) -> dict[str, Any]:
    """Logits by number of examples, the best answer first -> figures by number of examples."""
    first = halves(asked)
    labels = torch.zeros(len(asked), dtype=torch.long)
    own = crossed(found[0], labels, first)
    return {str(k): calibrated(logits, labels, own, crossed(logits, labels, first)) for k, logits in found.items()}


def halves(asked: Owned) -> Tensor:
    """[N]: whether a row is in the first of two halves, by its question alone."""
    order = sorted(range(len(asked)), key=lambda i: asked[i][1].position("temperature"))
    first = torch.zeros(len(asked), dtype=torch.bool)
    first[order[::2]] = True
    return first


def crossed(logits: Tensor, labels: Tensor, first: Tensor) -> Tensor:
    """[N]: the temperature of each row, fitted on the half that it is not in."""
    of_first, of_second = (fit_temperature(logits[half], labels[half]) for half in (first, ~first))
    return torch.where(first, of_second, of_first)


def everywhere(labels: Tensor, temperature: float) -> Tensor:
    """[N]: the same temperature for every row."""
    return torch.full(labels.shape, temperature, dtype=torch.float64)


def calibrated(logits: Tensor, labels: Tensor, own: Tensor, refitted: Tensor) -> dict[str, Any]:
    """Figures and reliability without a temperature, and with either of these; logits [N, E], the others [N]."""
    temperatures = {"none": everywhere(labels, 1.0), "own": own, "refitted": refitted}
    scaled = {name: logits.double() / t.double()[:, None] for name, t in temperatures.items()}
    figures = {name: router_metrics(some, labels) for name, some in scaled.items()}
    return {
        "temperatures": {name: sorted(set(t.tolist())) for name, t in temperatures.items()},
        "accuracy": figures["none"]["accuracy"],
        "ece": figures["none"]["ece"],
        "ece_t": figures["own"]["ece"],
        "ece_t_refitted": figures["refitted"]["ece"],
        **{f"{metric}_{name}": figures[name][metric] for metric in ("brier", "nll") for name in figures},
        "reliability": {name: reliability(some.softmax(-1), labels) for name, some in scaled.items()},
    }


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """Mean confidence, accuracy and number of rows of every bin that has any; probabilities [N, E], labels [N].

    The bins are those of `expected_calibration_error`, which is their mean gap, weighted by their rows.
    """
    confidence, chosen = probabilities.double().max(-1)
    hit = (chosen == labels).double()
    index = (confidence * bins).long().clamp_max(bins - 1)
    return [
        {
            "confidence": float(confidence[index == b].mean()),
            "accuracy": float(hit[index == b].mean()),
            "rows": int((index == b).sum()),
        }
        for b in sorted(set(index.tolist()))
    ]


def show(content: dict[str, Any]) -> None:
    columns = ["examples", "accuracy", "ECE", "ECE-t", "refitted", "Brier", "Brier-t", "refitted"]
    keys = ("accuracy", "ece", "ece_t", "ece_t_refitted", "brier_none", "brier_own", "brier_refitted")
    everyone = {"router": content["router"], **{f"answers of {n}": seen for n, seen in content["answers"].items()}}
    for name, seen in everyone.items():
        rows = [[count, *(f"{figures[key]:.4f}" for key in keys)] for count, figures in seen.items()]
        console.table(f"Calibration: {name}", columns, rows)


def draw(content: dict[str, Any]) -> Figure:
    """A row for the router and one for AlignX's answers: reliability by number of examples, then ECE and Brier."""
    both = {"router": content["router"], "answers (AlignX)": content["answers"].get("alignx")}
    present = {name: seen for name, seen in both.items() if seen}
    with drawing.styled():
        figure = drawing.figure(11.5, 3.2 * len(present))
        plots = figure.subplots(
            len(present), len(COUNTS) + 2, squeeze=False, width_ratios=[1.25] * len(COUNTS) + [1, 1]
        )
        for line, (name, seen) in zip(plots, present.items(), strict=True):
            for plot, (count, figures) in zip(line, seen.items(), strict=False):
                _diagram(plot, figures)
                plot.set_title(f"{name}, {_shots(count)}\naccuracy {figures['accuracy']:.3f}")
            line[0].set_ylabel("accuracy")
            _bars(line[-2], seen, {"none": "ece", "own": "ece_t", "refitted": "ece_t_refitted"}, "ECE ↓")
            _bars(line[-1], seen, {name: f"brier_{name}" for name in AFTER}, "Brier ↓")
        for plot in plots[-1][: len(COUNTS)]:
            plot.set_xlabel("confidence")
        for plot in plots[-1][len(COUNTS) :]:
            plot.set_xlabel("examples in the prompt")
        handles, labels = plots[0][-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        return figure


TINTS = {"none": "#D55E00", "own": drawing.LOUD, "refitted": "#009E73"}


def _shots(count: str) -> str:
    return "zero-shot" if count == "0" else f"{count}-shot"


def _diagram(plot: Any, figures: dict[str, Any]) -> None:
    """Dots are bins, as large as the share of the rows in them, and lines join those that are more than a few rows."""
    plot.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
    for name, bins in figures["reliability"].items():
        total = sum(b["rows"] for b in bins)
        x, y = ([b[key] for b in bins] for key in ("confidence", "accuracy"))
        sizes = [6 + 130 * b["rows"] / total for b in bins]
        plot.scatter(x, y, s=sizes, color=TINTS[name], alpha=0.75, linewidths=0)
        told = [b for b in bins if b["rows"] >= TELLING * total]
        line = ([b[key] for b in told] for key in ("confidence", "accuracy"))
        plot.plot(*line, color=TINTS[name], linewidth=0.9, alpha=0.6)
    plot.set_xlim(0, 1.05)
    plot.set_ylim(-0.03, 1.06)


def _bars(plot: Any, seen: dict[str, Any], keys: dict[str, str], title: str) -> None:
    values = np.array([[figures[key] for key in keys.values()] for figures in seen.values()])
    for number, name in enumerate(keys):
        bars = plot.bar(
            np.arange(len(seen)) + (number - 1) * 0.28, values[:, number], 0.26, color=TINTS[name], label=AFTER[name]
        )
        plot.bar_label(bars, fmt="%.3f", fontsize=6, padding=2, rotation=90)
    plot.set_ylim(0, max(0.01, float(values.max()) * 1.25))
    plot.set_xticks(range(len(seen)), list(seen))
    plot.set_title(title)
