"""`alignx-ds compare RUN_DIR …`: mean and standard deviation of every metric over several runs of one recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from alignx_ds.errors import DataError
from alignx_ds.evaluation.judges.protocol import label
from alignx_ds.runs.report import is_current, read_report
from alignx_ds.runtime import console

ROUTER_METRICS = {"accuracy": "accuracy", "ece": "ECE", "brier": "Brier score"}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; the deviation of one run is 0."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0)


def summarise(reports: list[dict[str, Any]]) -> dict[str, dict[str, Spread]]:
    """By system (and "router"), by metric. Raises DataError when the runs have different systems or axes."""
    first = reports[0]
    if any(list(r["systems"]) != list(first["systems"]) or r["scored"] != first["scored"] for r in reports):
        raise DataError("the runs have different systems or axes; compare runs of one recipe")
    columns = [c for c in (*first["scored"], "avg", "benign_served") if c in first["systems"]["base"]]
    table = {
        name: {c: Spread.of([r["systems"][name][c] for r in reports]) for c in columns}
        | {
            f"{axis} ppl": Spread.of([r["perplexity"][name][axis] for r in reports])
            for axis in first["perplexity"][name]
        }
        for name in first["systems"]
    }
    return table | {"router": {c: Spread.of([r["router"][c] for r in reports]) for c in ROUTER_METRICS}}


def show(directories: list[Path]) -> None:
    """Print mean ± standard deviation over the runs."""
    reports = [read_report(directory) for directory in directories]
    for directory, report in zip(directories, reports, strict=True):
        if not is_current(directory, report):
            fix = "give `alignx-ds run` again, which measures it"
            raise DataError(f"{directory / 'report.json'}: on another model than the one that is there now; {fix}")
    table = summarise(reports)
    router = table.pop("router")
    measured = next(iter(table.values()))
    likelihoods = [column for column in measured if column.endswith(" ppl")]
    scores = [column for column in measured if column not in likelihoods]
    for columns, digits in ((scores, 1), (likelihoods, 2)):
        shown = [
            [name, *(f"{f[c].mean:.{digits}f} ± {f[c].deviation:.{digits}f}" for c in columns)]
            for name, f in table.items()
        ]
        if columns:
            console.table(f"Mean ± standard deviation of {len(reports)} runs", ["system", *map(label, columns)], shown)
    parts = (f"{label} {router[key].mean:.3f} ± {router[key].deviation:.3f}" for key, label in ROUTER_METRICS.items())
    console.say("router: " + ", ".join(parts))
    for axis in reports[0]["collapse"]:
        lost = Spread.of([r["collapse"][axis]["sequential_loses"] for r in reports])
        kept = Spread.of([100 * r["collapse"][axis]["alignx_keeps"] for r in reports])
        console.say(
            f"{axis}: sequential fine-tuning loses {lost.mean:.1f} ± {lost.deviation:.1f} points of the specialist's "
            f"score, AlignX keeps {kept.mean:.1f} ± {kept.deviation:.1f} % of it"
        )
