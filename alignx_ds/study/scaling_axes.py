"""`alignx-ds study scaling-axes RECIPE`: how every system's worst axis fares as the goals become more, rarer or larger.

Its runs are made, or go on, unless they are finished (`scaling_runs`). The conflict of the axes' task vectors stands
beside their scores (`overlap`), of the run with all axes and the first seed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from alignx_ds.config import parse
from alignx_ds.evaluation.plots import PALETTE
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.runtime import console, distributed
from alignx_ds.study import overlap, plotting, results
from alignx_ds.study.compare import Spread
from alignx_ds.study.scaling_runs import ALIGNED, OWN, Curves, Scores, check, make, rows_of, smallest_axis, variants
from alignx_ds.study.studied_run import StudiedRun

WHAT = "scaling-axes"
TITLES = {"axes": "axes", "rows": "rows of the smallest axis", "rank": "rank of the experts"}
NOT_COMPARED = ("base", OWN)  # no systems that serve all axes at once


def study(recipe: str, overrides: Sequence[str], curves: Curves, seeds: Sequence[int], out: Path | None) -> list[Path]:
    """Make the runs, measure, draw and write; returns the files. Raises ConfigError, DataError and Stopped."""
    config = parse.load(recipe, list(overrides))
    check(config, curves)
    root, small = Path(config.output), smallest_axis(config)
    target = out if out is not None else root / "study"
    results.check_writable(target)
    scores: dict[str, list[Scores]] = {}  # by run, a set of scores for each seed
    merges: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for variant in variants(config, curves, seed, root):
            scores.setdefault(variant.name, []).append(make(variant, small))
            if variant.baselines:
                merges.setdefault(variant.name, []).append(_merges(variant.directory))
    distributed.silence_libraries()
    whole = root / f"seed-{seeds[0]}" / f"axes-{max(curves.axes)}"
    content = results.provenance(WHAT, [Path(recipe)], seeds[0], _arguments(overrides, curves, seeds)) | {
        "seeds": list(seeds),
        "axes": list(config.axes),
        "smallest": small,
        "curves": summarise(scores, curves, rows_of(config, small), config.experts.rank),
        "scores": scores,
        "merges": merges,
        "overlap": overlap.measure(StudiedRun.open(whole)),
    }
    show(content)
    written = results.write(WHAT, content, draw(content), target)
    console.say("wrote " + ", ".join(str(path) for path in written))
    return written


def _arguments(overrides: Sequence[str], curves: Curves, seeds: Sequence[int]) -> list[str]:
    """Of the command that repeats the study. Where its runs are kept changes no figure."""
    numbers = {"--axes": curves.axes, "--rows": curves.rows, "--ranks": curves.ranks, "--seeds": seeds}
    options = [word for name, values in numbers.items() for word in (name, *map(str, values))]
    return [given for given in overrides if not given.startswith("output=")] + options


def summarise(scores: dict[str, list[Scores]], curves: Curves, rows: int, rank: int) -> dict[str, Any]:
    """By curve, value and system: the spread over seeds of its worst and of its mean score, and its worst axes.

    `rows` and `rank` are the recipe's: the run with all axes is the point of these values on the other two curves.
    """
    whole = f"axes-{max(curves.axes)}"
    runs = {
        "axes": {n: f"axes-{n}" for n in curves.axes},
        "rows": {n: whole if n == rows else f"rows-{n}" for n in curves.rows},
        "rank": {n: whole if n == rank else f"rank-{n}" for n in curves.ranks},
    }
    return {
        curve: {str(value): _by_system(scores[name], curve == "rank") for value, name in by_value.items()}
        for curve, by_value in runs.items()
    }


def _by_system(seeds: list[Scores], aligned_alone: bool) -> dict[str, Any]:
    systems = [name for name in seeds[0] if name == ALIGNED or not aligned_alone]
    found = {}
    for name in systems:
        by_seed = [scores[name] for scores in seeds]
        worst = [min(by_axis, key=by_axis.__getitem__) for by_axis in by_seed]
        found[name] = {
            "worst": asdict(Spread.of([min(by_axis.values()) for by_axis in by_seed])),
            "mean": asdict(Spread.of([mean(by_axis.values()) for by_axis in by_seed])),
            "worst_axes": dict(Counter(worst)),
        }
        if name not in (*NOT_COMPARED, ALIGNED) and ALIGNED in seeds[0]:
            found[name]["behind"] = _behind(seeds, name)
    return found


def _behind(seeds: list[Scores], name: str) -> dict[str, float]:
    """How far its worst axis is below AlignX's: the mean over seeds of the difference, and its standard error."""
    gaps = [min(scores[ALIGNED].values()) - min(scores[name].values()) for scores in seeds]
    spread = Spread.of(gaps)
    return {"mean": spread.mean, "error": spread.deviation / math.sqrt(len(gaps))}


def _merges(directory: Path) -> dict[str, float]:
    """The scales and densities of the merges in a run."""
    report = FinishedRun.open(directory).report
    assert report is not None
    settings = report["config"]["baselines"]
    return {key: value for key, value in settings.items() if key.endswith(("_scale", "_density"))}


def show(content: dict[str, Any]) -> None:
    """A table for each curve: a system's worst score, and in brackets its mean score."""
    for curve, by_value in content["curves"].items():
        systems = list(dict.fromkeys(name for found in by_value.values() for name in found))
        rows = [[plotting.label(name), *(_cell(found.get(name)) for found in by_value.values())] for name in systems]
        title = f"Worst axis (mean over axes), {len(content['seeds'])} seeds"
        console.table(title, ["system", *(f"{TITLES[curve]}: {value}" for value in by_value)], rows)
    last = content["curves"]["axes"][str(max(map(int, content["curves"]["axes"])))]
    for name, found in last.items():
        if "behind" in found:
            gap = found["behind"]
            console.say(
                f"{plotting.label(name)}: {gap['mean']:.1f} ± {gap['error']:.1f} points below AlignX on its worst axis"
            )
    overlap.show(content["overlap"])


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    worst = found["worst"]
    return f"{worst['mean']:.1f} ± {worst['deviation']:.1f} ({found['mean']['mean']:.1f})"


def draw(content: dict[str, Any]) -> Figure:
    """The three curves, a line for each system with the deviation over seeds; below them the task vectors' conflict."""
    with plotting.styled():
        figure = plotting.figure(11.5, 7.6)
        curves, conflict = plotting.stacked(figure, [3.9, 3.7])
        plots = curves.subplots(1, len(TITLES), squeeze=False, sharey=True)[0]
        for plot, (curve, by_value) in zip(plots, content["curves"].items(), strict=True):
            _lines(plot, by_value)
            plot.set_title(TITLES[curve])
        plots[0].set_ylabel("score on the worst axis")
        curves.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        overlap.heats(conflict.subplots(1, len(overlap.TITLES), squeeze=False)[0], content["overlap"])
        return figure


def _lines(plot: Any, by_value: dict[str, Any]) -> None:
    values = sorted(by_value, key=int)
    systems = list(dict.fromkeys(name for value in values for name in by_value[value]))
    for number, name in enumerate(systems):
        there = [value for value in values if name in by_value[value]]
        worst = [by_value[value][name]["worst"] for value in there]
        look: dict[str, Any] = {"color": PALETTE[number % len(PALETTE)], "linewidth": 1.2, "alpha": 0.9}
        if name == ALIGNED:
            look = {"color": plotting.ACCENT, "linewidth": 2.6, "zorder": 5}
        elif name in NOT_COMPARED:
            look = {"color": plotting.MUTED, "linestyle": "--" if name == OWN else ":"}
        places = [values.index(value) for value in there]
        means, errors = [w["mean"] for w in worst], [w["deviation"] for w in worst]
        plot.errorbar(places, means, errors, label=plotting.label(name), marker="o", markersize=4, capsize=3, **look)
    plot.set_xticks(range(len(values)), values)
    plot.set_ylim(-3, 103)
