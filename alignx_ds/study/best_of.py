"""Best-of-n: the score against the number of answers that are drawn, of the base model and of AlignX.

The judges of the axes choose and one of them scores, so a curve is what such a judge could gain at most. Of 16 answers
to a prompt, n = 4 has four groups, and its score is their mean: every answer counts for every n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from alignx_ds.data.rows import Row
from alignx_ds.evaluation.best_of import Drawing, Weights, best, kl_bound, needs_by_gate, rewards
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import Judge
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.runtime import console
from alignx_ds.study import plotting
from alignx_ds.study.seeds import mean
from alignx_ds.study.studied_run import StudiedRun

COUNTS = (1, 2, 4, 8, 16)
SYSTEMS = ("base", "alignx")
Scores = dict[str, float]  # by axis, 0–100
Rated = Sequence[Mapping[str, Sequence[float]]]  # by row: the rewards of all its answers, by the judge's axis


def measure(studied: StudiedRun) -> dict[str, Any]:
    """By system: the greedy scores, and the scores by n, with judges that count alike and for AlignX by its gate."""
    bounds = [kl_bound(n) for n in COUNTS]
    judges = {axis: studied.config.axes[axis].judge for axis in studied.scored_axes}
    found = {name: _measured(studied, name) for name in SYSTEMS}
    return {"counts": COUNTS, "kl_bound": bounds, "judges": judges, "systems": found}


def _measured(studied: StudiedRun, name: str) -> dict[str, Any]:
    model, config = studied.system(name), studied.config
    axes, limit = studied.scored_axes, config.evaluation.max_new_tokens
    judges = {axis: registry.make(config.axes[axis].judge, config.judges) for axis in axes}
    drawing = Drawing(COUNTS[-1], seed=config.seed)
    curves: dict[str, list[Scores]] = {}
    with console.progress(f"answers of {name}", len(axes)) as progress:
        for axis in axes:
            rows = studied.data.held_out[axis]
            said = drawing.draw(model, studied.base.tokenizer, rows, batch=studied.batch, max_new_tokens=limit)
            rated = rewards(judges, rows, said)
            ways: dict[str, Sequence[Weights]] = {"alike": [dict.fromkeys(axes, 1.0)] * len(rows)}
            if isinstance(model, AlignXForCausalLM):
                ways["by the gate"] = needs_by_gate(model, studied.base.tokenizer, rows, studied.batch)
            for way, weights in ways.items():
                scores = curve(judges[axis], rows, said, rated, weights)
                for point, score in zip(curves.setdefault(way, [{} for _ in COUNTS]), scores, strict=True):
                    point[axis] = score
            progress.advance()
    return {"greedy": studied.scores(model), "best": curves}


def curve(
    judge: Judge, rows: Sequence[Row], said: Sequence[str], rated: Rated, weights: Sequence[Weights]
) -> list[float]:
    """By n of COUNTS: the mean score of the groups of n, where each row has `COUNTS[-1]` answers in `said`."""
    most, found = COUNTS[-1], []
    for n in COUNTS:
        scores = []
        for start in range(0, most, n):
            group = [{name: values[start : start + n] for name, values in row.items()} for row in rated]
            numbers = [start + best(row, own) for row, own in zip(group, weights, strict=True)]
            kept = [said[i * most + number] for i, number in enumerate(numbers)]
            scores.append(judge.metrics(rows, list(judge.verdicts(rows, kept)))["score"])
        found.append(mean(scores))
    return found


def show(content: dict[str, Any]) -> None:
    axes = list(content["judges"])
    rows = []
    for system, found in content["systems"].items():
        rows.append(_line(system, "greedy", "", found["greedy"], axes))
        for way, points in found["best"].items():
            for n, bound, point in zip(content["counts"], content["kl_bound"], points, strict=True):
                rows.append(_line(system, f"n = {n}, judges {way}", f"{bound:.2f}", point, axes))
    columns = ["system", "answers", "KL ≤ (nats)", *axes, "avg"]
    console.table("The best of n answers, by the judges that score them", columns, rows, texts=(0, 1))


def _line(system: str, what: str, bound: str, scores: Scores, axes: Sequence[str]) -> list[str]:
    values = [scores[axis] for axis in axes]
    return [plotting.label(system), what, bound, *(f"{value:.1f}" for value in (*values, mean(values)))]


def draw(content: dict[str, Any]) -> Figure:
    """The mean over the axes against n, with the bound of the divergence above; an axis a plot beside it."""
    axes, counts = list(content["judges"]), content["counts"]
    with plotting.styled():
        figure = plotting.figure(2.6 * (len(axes) + 1), 3.3)
        for plot, axis in zip(figure.subplots(1, len(axes) + 1, squeeze=False)[0], ["", *axes], strict=True):
            for system, colour in zip(content["systems"], ("black", plotting.ACCENT), strict=True):
                found = content["systems"][system]
                for (way, points), style in zip(found["best"].items(), ("o-", "s--"), strict=False):
                    values = [_value(point, axis, axes) for point in points]
                    label = f"{plotting.label(system)}, judges {way}"
                    plot.plot(counts, values, style, color=colour, markersize=3.5, label=label)
                greedy = _value(found["greedy"], axis, axes)
                plot.axhline(
                    greedy, color=colour, linewidth=0.8, linestyle=":", label=f"{plotting.label(system)}, greedy"
                )
            plot.set_xscale("log", base=2)
            plot.set_xticks(counts)
            plot.xaxis.set_major_formatter(ScalarFormatter())
            plot.set(xlabel="answers drawn, n", title=axis or "mean of the axes", ylim=(-3, 103))
            if not axis:
                bounds = plot.secondary_xaxis(-0.28)
                bounds.set_xticks(counts, [f"{bound:.2f}" for bound in content["kl_bound"]])
                bounds.set_xlabel("log n − (n − 1)/n, nats")
                plot.set_ylabel("score")
        figure.legend(*plot.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return figure


def _value(scores: Scores, axis: str, axes: Sequence[str]) -> float:
    return scores[axis] if axis else mean(scores[name] for name in axes)
