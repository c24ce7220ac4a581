"""`alignx-ds study WHAT RUN_DIR …`: measure, draw, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.runtime import console, distributed
from alignx_ds.study import (
    best_of,
    calibration,
    contributions,
    drift,
    ensembles,
    forgetting,
    guided,
    misalignment,
    overlap,
    prompts,
    results,
    robustness,
    seeds,
    sensitivity,
    steering,
)
from alignx_ds.study.studied_run import FREE_JUDGES, StudiedRun

Measure = Callable[[StudiedRun], dict[str, Any]]
Draw = Callable[[dict[str, Any]], Figure]
STUDIES: dict[str, tuple[Measure, Draw, Callable[[dict[str, Any]], None]]] = {
    "drift": (drift.measure, drift.draw, drift.show),
    "forgetting": (forgetting.measure, forgetting.draw, forgetting.show),
    "misalignment": (misalignment.measure, misalignment.draw, misalignment.show),
    "contributions": (contributions.measure, contributions.draw, contributions.show),
    "calibration": (calibration.measure, calibration.draw, calibration.show),
    "overlap": (overlap.measure, overlap.draw, overlap.show),
    "steering": (steering.measure, steering.draw, steering.show),
    "robustness": (robustness.measure, robustness.draw, robustness.show),
    "best-of": (best_of.measure, best_of.draw, best_of.show),
    "ensembles": (ensembles.measure, ensembles.draw, ensembles.show),
    "guided": (guided.measure, guided.draw, guided.show),
    "prompts": (prompts.measure, prompts.draw, prompts.show),
    "sensitivity": (sensitivity.measure, sensitivity.draw, sensitivity.show),
}
SCORED = ("steering", "best-of", "ensembles", "guided", "sensitivity")  # measure nothing but scores


def study(
    what: str, directories: Sequence[Path], out: Path | None, options: prompts.Options = prompts.DEFAULTS
) -> list[Path]:
    """Make one study of a run; returns the files that it wrote. The options are of `prompts` alone.

    Of several runs, the study of each is written into its own directory, and their mean into `out`.
    Raises ConfigError or DataError.
    """
    distributed.silence_libraries()
    opened = [StudiedRun.open(directory) for directory in directories]
    several = len(directories) > 1
    assert out is not None or not several, "the mean of several runs has no directory of its own"
    targets = [directory / "study" if several or out is None else out for directory in directories]
    for target in (*targets, *([out] if out else [])):
        results.check_writable(target)
    for studied, directory in zip(opened, directories, strict=True):
        _check_judges(what, studied, directory)
    contents, written = [], []
    for studied, directory, target in zip(opened, directories, targets, strict=True):
        if several:
            console.say(f"{directory}:")
        contents.append(_content(what, studied, directory, options))
        written += _written(what, contents[-1], target)
    if several and out is not None:
        console.say(f"mean of {len(directories)} runs:")
        written += _written(what, mean_of(what, directories, contents, options), out)
    return written


def _check_judges(what: str, studied: StudiedRun, directory: Path) -> None:
    if what in SCORED and not studied.scored_axes:
        fix = "its answers need a judge model or another server; study drift, contributions, calibration or overlap"
        raise ConfigError(Problem("RUN_DIR", str(directory), f"a run with a judge of {', '.join(FREE_JUDGES)}", fix))


def _content(what: str, studied: StudiedRun, directory: Path, options: prompts.Options) -> dict[str, Any]:
    measure = partial(prompts.measure, options=options) if what == "prompts" else STUDIES[what][0]
    return results.provenance(what, [directory], studied.config.seed, options.arguments) | measure(studied)


def mean_of(
    what: str, directories: Sequence[Path], contents: Sequence[dict[str, Any]], options: prompts.Options
) -> dict[str, Any]:
    """Of the contents of a study of several runs. Raises DataError where they do not match."""
    known = {*results.PROVENANCE, results.EVERY_ANSWER}
    mean = seeds.averaged([{key: part for key, part in content.items() if key not in known} for content in contents])
    found = results.provenance(what, directories, [content["seed"] for content in contents], options.arguments)
    return found | mean | {"deviation": seeds.deviations(mean)}


def _written(what: str, content: dict[str, Any], out: Path) -> list[Path]:
    _, draw, show = STUDIES[what]
    show(content)
    written = results.write(what, content, draw(content), out)
    console.say("wrote " + ", ".join(str(path) for path in written))
    return written
