"""`alignx-ds study WHAT RUN_DIR`: measure, draw, write."""

from __future__ import annotations

from collections.abc import Callable
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


def study(what: str, directory: Path, out: Path | None, options: prompts.Options = prompts.DEFAULTS) -> list[Path]:
    """Make one study of a run; returns the files that it wrote. The options are of `prompts` alone.

    Raises ConfigError or DataError.
    """
    distributed.silence_libraries()
    target = out if out is not None else directory / "study"
    studied = StudiedRun.open(directory)
    results.check_writable(target)
    if what in SCORED and not studied.scored_axes:
        fix = "its answers need a judge model or another server; study drift, contributions, calibration or overlap"
        raise ConfigError(Problem("RUN_DIR", str(directory), f"a run with a judge of {', '.join(FREE_JUDGES)}", fix))
    measure, draw, show = STUDIES[what]
    if what == "prompts":
        measure = partial(prompts.measure, options=options)
    content = results.provenance(what, directory, studied.config.seed, options.arguments) | measure(studied)
    show(content)
    written = results.write(what, content, draw(content), target)
    console.say("wrote " + ", ".join(str(path) for path in written))
    return written
