"""What a run measured, for model cards: every system on every axis, every judge on every axis, sets, and the router."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub import EvalResult

from alignx_ds.evaluation import matrix
from alignx_ds.evaluation.judges.protocol import BESIDE, label, set_columns
from alignx_ds.runs.finished import FinishedRun

NOT_EVALUATED = "Not evaluated: the model was made by `alignx-ds align`, which does not measure it."
ROUTER = ("accuracy", "ece", "brier")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column is text, the others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(run: FinishedRun) -> str:
    """The run's report as tables."""
    report = run.report
    if report is None:
        return NOT_EVALUATED
    made = report["run"]
    when = f"Measured {made['date'][:10]}, seed {made['seed']}, on {made['hardware']}."
    parts = (_scores(report), _matrix(report), _sets(report), _perplexity(report), _router(report["router"]), [when])
    return "\n\n".join(paragraph for part in parts for paragraph in part)


def results(run: FinishedRun) -> list[EvalResult]:
    """The aligned model's score on each axis, as the hub's `model-index` has it."""
    report = run.report
    if report is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=run.config.axes[axis].judged_as()[0],
            dataset_name=f"{axis}, held-out rows",
            metric_type=report["judges"][axis],
            metric_name=f"score of the judge {report['judges'][axis]}, 0–100",
            metric_value=round(report["systems"]["alignx"][axis], 2),
        )
        for axis in report["scored"]
    ]


def _scores(report: dict[str, Any]) -> Iterator[str]:
    scored, systems = report["scored"], report["systems"]
    if not scored:
        return
    columns = [*scored, *(name for name in ("avg", *BESIDE) if name in systems["alignx"])]
    rows = [[name, *(f"{scores[c]:.1f}" for c in columns)] for name, scores in systems.items()]
    yield "Held-out rows, no hint of the axis in the prompt (0–100, higher is better):"
    yield table(["system", *map(label, columns)], rows)
    judges = ", ".join(f"{axis} by {report['judges'][axis]}" for axis in scored)
    yield f"Judges: {judges}; at most {report['run']['held_out_rows']} held-out rows per axis."


def _matrix(report: dict[str, Any]) -> Iterator[str]:
    shown = matrix.columns(report["matrix"], report["judges"])
    if not shown:
        return
    columns = [f"{axis}: {label(judge)}" for axis, judges in shown.items() for judge in judges]
    rows = [[name, *(f"{s:.1f}" for s in scores)] for name, scores in matrix.scores(report["matrix"], shown).items()]
    counts = {axis: counts["held_out"] for axis, counts in report["rows"].items()}
    yield "The prompts of each axis under the judges of all axes (0–100, higher is better):"
    yield table(["system", *columns], rows)
    yield " ".join(matrix.notes(shown, report["matrix"]["alignx"], counts))


def _sets(report: dict[str, Any]) -> Iterator[str]:
    for name, systems in report["sets"].items():
        columns = set_columns(systems)
        rows = [[system, *(f"{m[c]:.1f}" if c in m else "–" for c in columns)] for system, m in systems.items()]
        yield f"Questions of {name}, judged by {report['judges'][name]}:"
        yield table(["system", *map(label, columns)], rows)


def _perplexity(report: dict[str, Any]) -> Iterator[str]:
    perplexity = report["perplexity"]
    yield "Perplexity of held-out reference answers (lower is better):"
    rows = [[name, *(f"{value:.2f}" for value in by_axis.values())] for name, by_axis in perplexity.items()]
    yield table(["system", *perplexity["alignx"]], rows)


def _router(router: dict[str, Any]) -> Iterator[str]:
    """The gate, the same before its temperature, a classifier of words, and the gate by source."""
    compared = {
        "gate": router,
        "gate before its temperature was fitted": router["uncalibrated"],
        "TF-IDF and logistic regression": router["surface"],
    }
    compared |= {
        f"gate on {name}": source for name, source in router.get("sources", {}).items() if source["kind"] != "own"
    }
    yield f"Router: accuracy {router['accuracy']:.3f}, ECE {router['ece']:.3f}, Brier {router['brier']:.3f}."
    rows = [[name, *(f"{metrics[key]:.3f}" for key in ROUTER)] for name, metrics in compared.items()]
    yield table(["router on held-out prompts", "accuracy", "ECE", "Brier"], rows)
