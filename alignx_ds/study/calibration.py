"""Figure 5: how well calibrated the router and the answers are, zero-shot and few-shot, before and after a temperature.

ECE is without a temperature. ECE-t is with the temperature fitted zero-shot, on questions without examples (Guo et al.
2017); "refitted" is with one fitted on questions with as many examples. Examples are training rows of the question's
own axis: they show the router the axis, and make the prompt unlike those that the router was fitted on.

The answers' confidence is the softmax over the log-probabilities of the best answer and the incorrect ones, as in MC1;
rows without incorrect answers are left out. The router's temperature is fitted on the calibration split. The answers'
can't be, since stage 1 was trained on those answers: it is fitted on one half of the held-out rows and tested on the
other half, and vice versa.

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
from alignx_ds.data.labels import as_sets, label_set
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.likelihood import likelihoods
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.by_source import by_source
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.metrics import BINS, axis_forecasts, router_metrics
from alignx_ds.routing.temperature import fit_temperature
from alignx_ds.runtime import console
from alignx_ds.study import plotting
from alignx_ds.study.few_shot import FewShotPrompts
from alignx_ds.study.studied_run import SYSTEMS, StudiedRun

COUNTS = (0, 1, 3)  # examples in the prompt
NO_ANSWER = -1e9  # the logit that pads questions with fewer answers
OwnedRows = list[tuple[str, Row]]
SMALL_BIN = 0.02  # a bin with a smaller share of the rows is too noisy to be joined by a line
TEMPERATURES = {"none": "no temperature", "own": "temperature fitted zero-shot", "refitted": "temperature refitted"}


def measure(studied: StudiedRun) -> dict[str, Any]:
    """By number of examples: calibration of the router, and of every system's answers."""
    pools = {name: [row for row in rows if row.response] for name, (rows, _) in studied.training_rows().items()}
    calibration = studied.calibration_rows()
    limit = int(getattr(studied.base.config, "max_position_embeddings", 0) or studied.config.model.max_length)
    shots = FewShotPrompts(studied.base.tokenizer, studied.config.seed, limit, pools)
    questions = multiple_choice(studied.held_out_rows())
    groups = {count: _answers(questions, shots, count) for count in COUNTS}
    answers: dict[str, Any] = {}
    with console.progress("calibration", (1 + len(SYSTEMS)) * len(COUNTS)) as bar:
        for name in SYSTEMS:
            model = studied.system(name)
            if name == "alignx":
                assert isinstance(model, AlignXForCausalLM)
                router = _router(model, studied, shots, calibration, bar.advance)
                sources = _sources(model, studied)
            if len(questions) > 1:
                answers[name] = _calibration_of(
                    {count: _choices(model, studied, g) for count, g in groups.items()}, questions
                )
            bar.advance(by=len(COUNTS))
    return {
        "examples": list(COUNTS),
        "bins": BINS,
        "rows": {
            "router": {"calibration": len(calibration), "held out": len(studied.held_out_rows())},
            "answers": {"held out": len(questions)},
        },
        "router": router,
        "sources": sources,
        "answers": answers,
    }


def multiple_choice(owned: OwnedRows) -> OwnedRows:
    """The axes' rows that have a best answer and incorrect ones."""
    return [(name, row) for name, row in owned if row.response and row.incorrect and name != "generalist"]


def _router(
    model: AlignXForCausalLM, studied: StudiedRun, shots: FewShotPrompts, calibration: OwnedRows, advance: Any
) -> dict[str, Any]:
    """Calibration of the lowest gate, as in the run's report."""
    names, lowest = studied.experts, min(gates_of(model))
    kind = model.config.gate_settings().kind
    found, own = {}, 0.0
    for count in COUNTS:
        logits, labels, weights = [], [], []
        for owned in (calibration, studied.held_out_rows()):
            examples = [shots.encoded(row, shots.examples(name, row, count), ())[0] for name, row in owned]
            needs = [label_set(row, names, names.index(name)) for name, row in owned]
            owners, sources = [names.index(name) for name, _ in owned], [row.source for _, row in owned]
            rows = LabelledExamples(examples, owners, needs, sources)
            logits.append(sum_of(gate_terms(model, rows, studied.pad_id, studied.batch)[lowest]))
            labels.append(rows.multi_hot(len(names)))
            weights.append(rows.weights())
        refitted = fit_temperature(logits[0], labels[0], kind, weights[0])
        own = own or refitted
        found[str(count)] = calibrated(
            logits[1], labels[1], same_for_all(labels[1], own), same_for_all(labels[1], refitted), kind
        )
        advance()
    return found


def _sources(model: AlignXForCausalLM, studied: StudiedRun) -> dict[str, Any]:
    """The router on every source of prompts, with the temperature that the model has, as in the run's report."""
    rows = (studied.data.routed, studied.pad_id, studied.batch)
    lowest, gate = next(iter(gates_of(model).items()))
    routed = sum_of(gate_terms(model, *rows)[lowest]) / float(gate.calibration_temperature)
    found = by_source(model, studied.data, routed, studied.experts, studied.pad_id, studied.batch)
    return {name: source.content() for name, source in found.items()}


def _answers(owned: OwnedRows, shots: FewShotPrompts, count: int) -> list[list[Example]]:
    """For every row, its prompt with each of its answers, the best one first."""
    return [shots.encoded(row, shots.examples(name, row, count), (row.response, *row.incorrect)) for name, row in owned]


def _choices(model: PreTrainedModel, studied: StudiedRun, groups: list[list[Example]]) -> Tensor:
    """[N, E]: the log-probability of each answer, the best one first."""
    flat = iter(likelihoods(model, [e for group in groups for e in group], studied.pad_id, studied.batch))
    logits = torch.full((len(groups), max(map(len, groups))), NO_ANSWER, dtype=torch.float64)
    for line, group in enumerate(groups):
        logits[line, : len(group)] = torch.tensor([next(flat).log_probability for _ in group], dtype=torch.float64)
    return logits


def _calibration_of(found: dict[int, Tensor], questions: OwnedRows) -> dict[str, Any]:
    """Logits by number of examples, the best answer first -> calibration by number of examples."""
    first = halves(questions)
    labels = torch.zeros(len(questions), dtype=torch.long)
    own = cross_fitted(found[0], labels, first)
    return {str(k): calibrated(logits, labels, own, cross_fitted(logits, labels, first)) for k, logits in found.items()}


def halves(questions: OwnedRows) -> Tensor:
    """[N]: whether a row is in the first half. It depends on the questions, not on the order of the rows."""
    order = sorted(range(len(questions)), key=lambda i: questions[i][1].position("temperature"))
    first = torch.zeros(len(questions), dtype=torch.bool)
    first[order[::2]] = True
    return first


def cross_fitted(logits: Tensor, labels: Tensor, first: Tensor) -> Tensor:
    """[N]: each row's temperature, fitted on the half that the row is not in."""
    of_first, of_second = (fit_temperature(logits[half], labels[half]) for half in (first, ~first))
    return torch.where(first, of_second, of_first)


def same_for_all(labels: Tensor, temperature: float) -> Tensor:
    """[N]: the same temperature for every row."""
    return torch.full((len(labels),), temperature, dtype=torch.float64)


def calibrated(logits: Tensor, labels: Tensor, own: Tensor, refitted: Tensor, kind: str = "choice") -> dict[str, Any]:
    """Metrics and reliability without a temperature, and with each of these.

    logits [N, E], labels [N] or [N, E], temperatures [N].
    """
    temperatures = {"none": same_for_all(labels, 1.0), "own": own, "refitted": refitted}
    scaled = {name: logits.double() / t.double()[:, None] for name, t in temperatures.items()}
    metrics = {name: router_metrics(some, labels, kind) for name, some in scaled.items()}
    return {
        "temperatures": {name: sorted(set(t.tolist())) for name, t in temperatures.items()},
        "accuracy": metrics["none"]["accuracy"],
        "ece": metrics["none"]["ece"],
        "ece_t": metrics["own"]["ece"],
        "ece_t_refitted": metrics["refitted"]["ece"],
        **{f"{metric}_{name}": metrics[name][metric] for metric in ("brier", "nll") for name in metrics},
        "reliability": {name: reliability(*forecasts(some, labels, kind)) for name, some in scaled.items()},
    }


def forecasts(logits: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(confidences, outcomes) [N] of a choice; in needs [N·(E − 1)], of every axis's own forecasts."""
    sets = as_sets(labels, logits.shape[-1]).double()
    if kind == "needs":
        return axis_forecasts(logits, kind).flatten(), sets[:, 1:].flatten()
    confidence, chosen = logits.softmax(-1).max(-1)
    return confidence, sets.gather(-1, chosen[:, None])[:, 0]


def reliability(confidence: Tensor, hit: Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """Mean confidence, accuracy and number of rows of every bin that has rows; confidences and outcomes [N] fp64.

    The bins are those of `expected_calibration_error`.
    """
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
    columns = ["examples", "accuracy", "ECE", "ECE-t", "ECE refitted", "Brier", "Brier-t", "Brier refitted"]
    keys = ("accuracy", "ece", "ece_t", "ece_t_refitted", "brier_none", "brier_own", "brier_refitted")
    tables = {"the router": content["router"]}
    tables |= {f"the answers of {plotting.label(name)}": found for name, found in content["answers"].items()}
    for name, by_count in tables.items():
        rows = [[count, *(f"{metrics[key]:.4f}" for key in keys)] for count, metrics in by_count.items()]
        console.table(f"Calibration of {name}", columns, rows)
    of_source = ("accuracy", "confidence", "ece", "brier")
    rows = [[name, str(s["prompts"]), *(f"{s[k]:.4f}" for k in of_source)] for name, s in content["sources"].items()]
    console.table("The router by source of the prompts", ["source", "prompts", *of_source], rows)
    console.say("-t: with the temperature fitted zero-shot; refitted: fitted on prompts with as many examples")


def draw(content: dict[str, Any]) -> Figure:
    """A row for the router and one for AlignX's answers: reliability diagrams, then ECE and Brier score."""
    both = {"router": content["router"], "AlignX's answers": content["answers"].get("alignx")}
    present = {name: by_count for name, by_count in both.items() if by_count}
    with plotting.styled():
        figure = plotting.figure(11.5, 3.2 * len(present))
        plots = figure.subplots(
            len(present), len(COUNTS) + 2, squeeze=False, width_ratios=[1.25] * len(COUNTS) + [1, 1]
        )
        for line, (name, by_count) in zip(plots, present.items(), strict=True):
            for plot, (count, metrics) in zip(line, by_count.items(), strict=False):
                _diagram(plot, metrics)
                plot.set_title(f"{name}, {_shots(count)}\naccuracy {metrics['accuracy']:.3f}")
            line[0].set_ylabel("accuracy")
            _bars(line[-2], by_count, {"none": "ece", "own": "ece_t", "refitted": "ece_t_refitted"}, "ECE ↓")
            _bars(line[-1], by_count, {name: f"brier_{name}" for name in TEMPERATURES}, "Brier ↓")
        for plot in plots[-1][: len(COUNTS)]:
            plot.set_xlabel("confidence")
        for plot in plots[-1][len(COUNTS) :]:
            plot.set_xlabel("examples in the prompt")
        handles, labels = plots[0][-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        return figure


TINTS = {"none": "#D55E00", "own": plotting.ACCENT, "refitted": "#009E73"}


def _shots(count: str) -> str:
    return "zero-shot" if count == "0" else f"{count}-shot"


def _diagram(plot: Any, metrics: dict[str, Any]) -> None:
    """A dot per bin, its area by the bin's share of the rows; lines join all but the small bins."""
    plot.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
    for name, bins in metrics["reliability"].items():
        total = sum(b["rows"] for b in bins)
        x, y = ([b[key] for b in bins] for key in ("confidence", "accuracy"))
        sizes = [6 + 130 * b["rows"] / total for b in bins]
        plot.scatter(x, y, s=sizes, color=TINTS[name], alpha=0.75, linewidths=0)
        joined = [b for b in bins if b["rows"] >= SMALL_BIN * total]
        line = ([b[key] for b in joined] for key in ("confidence", "accuracy"))
        plot.plot(*line, color=TINTS[name], linewidth=0.9, alpha=0.6)
    plot.set_xlim(0, 1.05)
    plot.set_ylim(-0.03, 1.06)


def _bars(plot: Any, by_count: dict[str, Any], keys: dict[str, str], title: str) -> None:
    values = np.array([[metrics[key] for key in keys.values()] for metrics in by_count.values()])
    for number, name in enumerate(keys):
        bars = plot.bar(
            np.arange(len(by_count)) + (number - 1) * 0.28,
            values[:, number],
            0.26,
            color=TINTS[name],
            label=TEMPERATURES[name],
        )
        plot.bar_label(bars, fmt="%.3f", fontsize=6, padding=2, rotation=90)
    plot.set_ylim(0, max(0.01, float(values.max()) * 1.25))
    plot.set_xticks(range(len(by_count)), list(by_count))
    plot.set_title(title)
