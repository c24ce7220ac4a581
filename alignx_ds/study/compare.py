"""`alignx-ds compare RUN_DIR …`: mean and standard deviation of every metric over several runs of one recipe."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from alignx_ds.errors import DataError
from alignx_ds.evaluation.judges.protocol import BESIDE, JUDGE_PREFIX, KIND, label
from alignx_ds.evaluation.report import ABLATIONS
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
    if any(
        r["sets"].keys() != first["sets"].keys() or r["ablations"].keys() != first["ablations"].keys() for r in reports
    ):
        raise DataError("the runs have different extra sets or ablations; compare runs of one recipe")
    columns = [c for c in (*first["scored"], "avg", *BESIDE) if c in first["systems"]["base"]]
    table = {
        name: {c: Spread.of([r["systems"][name][c] for r in reports]) for c in columns}
        | {
            f"{axis} ppl": Spread.of([r["perplexity"][name][axis] for r in reports])
            for axis in first["perplexity"][name]
        }
        for name in first["systems"]
    }
    return table | {"router": {c: Spread.of([r["router"][c] for r in reports]) for c in ROUTER_METRICS}}


def summarise_sets(reports: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Spread]]]:
    """By extra question set, system and metric, with the aligned model's ablations as further systems."""
    found: dict[str, dict[str, dict[str, Spread]]] = {}
    for name in reports[0]["sets"]:
        runs = [
            r["sets"][name] | {a: m["sets"][name] for a, m in r["ablations"].items() if "sets" in m} for r in reports
        ]
        found[name] = {
            system: {metric: Spread.of([run[system][metric] for run in runs]) for metric in metrics}
            for system, metrics in runs[0].items()
            if all(run.get(system, {}).keys() >= metrics.keys() for run in runs)
        }
    return found


def show(directories: list[Path], out: Path | None = None) -> None:
    """Print mean ± standard deviation over the runs, and write them to `out` as JSON."""
    reports = [read_report(directory) for directory in directories]
    for directory, report in zip(directories, reports, strict=True):
        if not is_current(directory, report):
            fix = "give `alignx-ds run` again, which measures it"
            raise DataError(f"{directory / 'report.json'}: on another model than the one that is there now; {fix}")
    table, sets = summarise(reports), summarise_sets(reports)
    router = {key: table["router"][key] for key in ROUTER_METRICS}
    systems = {name: metrics for name, metrics in table.items() if name != "router"}
    _show_systems(systems, len(reports))
    for name, by_system in sets.items():
        _show_set(name, by_system)
    parts = (f"{label} {router[key].mean:.3f} ± {router[key].deviation:.3f}" for key, label in ROUTER_METRICS.items())
    console.say("router: " + ", ".join(parts))
    for axis in reports[0]["collapse"]:
        lost = Spread.of([r["collapse"][axis]["sequential_loses"] for r in reports])
        kept = Spread.of([100 * r["collapse"][axis]["alignx_keeps"] for r in reports])
        console.say(
            f"{axis}: sequential fine-tuning loses {lost.mean:.1f} ± {lost.deviation:.1f} points of the specialist's "
            f"score, AlignX keeps {kept.mean:.1f} ± {kept.deviation:.1f} % of it"
        )
    if out is not None:
        _write(out, reports, {"systems": systems, "sets": sets, "router": router})


def _show_systems(systems: dict[str, dict[str, Spread]], runs: int) -> None:
    measured = next(iter(systems.values()))
    likelihoods = [column for column in measured if column.endswith(" ppl")]
    scores = [column for column in measured if column not in likelihoods]
    for columns, digits in ((scores, 1), (likelihoods, 2)):
        rows = [[name, *(_text(f[c], digits) for c in columns)] for name, f in systems.items()]
        if columns:
            console.table(f"Mean ± standard deviation of {runs} runs", ["system", *map(label, columns)], rows)


def _show_set(name: str, by_system: dict[str, dict[str, Spread]]) -> None:
    """The metrics of all systems; the scores of its kinds of rows only of AlignX and of the best other system."""
    measured = next(iter(by_system.values()), {})
    columns = [metric for metric in measured if not metric.startswith((KIND, JUDGE_PREFIX))]
    rows = [[system, *(_text(m[c]) for c in columns)] for system, m in by_system.items()]
    console.table(name, ["system", *map(label, columns)], rows)
    others = [system for system in by_system if system != "alignx" and system not in ABLATIONS]
    lines = []
    for kind in (metric for metric in by_system.get("alignx", {}) if metric.startswith(KIND)):
        rivals = {system: by_system[system][kind].mean for system in others if kind in by_system[system]}
        best = max(rivals, key=rivals.__getitem__)
        pair = [by_system[system][kind] for system in ("alignx", best)]
        share = f"{pair[0].mean / pair[1].mean:.2f}" if pair[1].mean else "–"
        lines.append([kind.removeprefix(KIND), *map(_text, pair), best, share])
    if lines:
        console.table(f"{name}, by kind", ["kind", "alignx", "best other", "system", "share"], lines)


def _text(spread: Spread, digits: int = 1) -> str:
    return f"{spread.mean:.{digits}f} ± {spread.deviation:.{digits}f}"


def _write(out: Path, reports: list[dict[str, Any]], table: dict[str, Any]) -> None:
    runs = [report["run"] for report in reports]
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"runs": runs, **table}
    out.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=asdict) + "\n", encoding="utf-8")
