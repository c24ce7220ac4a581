"""Sensitivity to a setting that needs training: the scores of finished runs that differ in this key alone.

Runs with the same value, such as those of several seeds, are one point, with their deviation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alignx_ds.config import parse
from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.evaluation.plots import PALETTE
from alignx_ds.runs.report import read_report
from alignx_ds.runtime import console
from alignx_ds.study import plotting, results
from alignx_ds.study.compare import Spread

FREE = ("output", "seed", "specialists")  # where the files are, and what makes runs differ by chance alone
MEAN = "avg"


def study(directories: Sequence[Path], key: str, out: Path | None) -> list[Path]:
    """Compare the runs, draw and write; returns the files. Raises ConfigError and DataError before it writes."""
    target = out if out is not None else directories[0] / "study"
    results.check_writable(target)
    reports = [read_report(directory) for directory in directories]
    settings = [dict(parse.flat(parse.to_dict(parse.load(directory / "config.yaml")))) for directory in directories]
    content = compared(directories, settings, reports, key)
    name, seed = f"sensitivity-{key}", reports[0]["run"]["seed"]
    content = results.provenance("sensitivity", directories, seed, ["--by", key]) | content
    show(content)
    written = results.write(name, content, draw(content), target)
    console.say("wrote " + ", ".join(str(path) for path in written))
    return written


def compared(
    directories: Sequence[Path], settings: Sequence[dict[str, Any]], reports: Sequence[dict[str, Any]], key: str
) -> dict[str, Any]:
    """By value of the key, in order, by system and axis: the spread over the runs with this value.

    Raises ConfigError for a key that the runs have not, or whose value is the same in all, and DataError for runs that
    differ in another key too, or in their axes.
    """
    if any(isinstance(one.get(key), list | None) for one in settings):
        raise ConfigError(Problem("--by", key, "a key of the runs' recipes", "see their config.yaml, e.g. align.steps"))
    first, scored = settings[0], reports[0]["scored"]
    for directory, one, report in zip(directories[1:], settings[1:], reports[1:], strict=True):
        free = (key, *FREE)
        other = sorted(k for k in {*one, *first} if one.get(k) != first.get(k) and k not in free)
        if other or report["scored"] != scored:
            what = f"{', '.join(other) or 'the axes that are scored'} too"
            fix = f"compare runs that only differ in {key}"
            raise DataError(f"{directory}: differs from {directories[0]} in {what}; {fix}")
    by_value = defaultdict(list)
    for one, report in zip(settings, reports, strict=True):
        by_value[one[key]].append(report["systems"])
    if len(by_value) < 2:
        raise ConfigError(Problem("--by", key, "a key in which the runs differ", f"all have {next(iter(by_value))}"))
    values = sorted(by_value, key=lambda value: (isinstance(value, str), value))
    columns = [*scored, MEAN]
    systems = [name for name in reports[0]["systems"] if all(name in found for r in by_value.values() for found in r)]
    return {
        "key": key,
        "values": values,
        "runs": [len(by_value[value]) for value in values],
        "columns": columns,
        "systems": {
            name: [
                {column: asdict(Spread.of([found[name][column] for found in by_value[value]])) for column in columns}
                for value in values
            ]
            for name in systems
        },
    }


def show(content: dict[str, Any]) -> None:
    """A system a row: its mean over the axes by value of the key."""
    heads = [
        f"{value} ({count} run{'s' * (count > 1)})"
        for value, count in zip(content["values"], content["runs"], strict=True)
    ]
    rows = [
        [plotting.label(name), *(f"{point[MEAN]['mean']:.1f} ± {point[MEAN]['deviation']:.1f}" for point in points)]
        for name, points in content["systems"].items()
    ]
    console.table(f"Average by {content['key']}", ["system", *heads], rows)


def draw(content: dict[str, Any]) -> Figure:
    """The mean and each axis a plot: a line for each system, with the deviation over the runs of a value."""
    columns, values = content["columns"], content["values"]
    with plotting.styled():
        figure = plotting.figure(2.8 * len(columns), 3.4)
        for plot, column in zip(figure.subplots(1, len(columns), squeeze=False, sharey=True)[0], columns, strict=True):
            for number, (name, points) in enumerate(content["systems"].items()):
                look: dict[str, Any] = {"color": PALETTE[number % len(PALETTE)], "linewidth": 1.1}
                if name == "alignx":
                    look = {"color": plotting.ACCENT, "linewidth": 2.6, "zorder": 5}
                means, errors = ([point[column][part] for point in points] for part in ("mean", "deviation"))
                label = plotting.label(name)
                plot.errorbar(
                    range(len(values)), means, errors, marker="o", markersize=3.5, capsize=3, label=label, **look
                )
            plot.set_xticks(range(len(values)), list(map(str, values)))
            plot.set(title=column, xlabel=content["key"], ylim=(-3, 103))
        figure.legend(*plot.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        return figure
