"""`alignx-ds study WHAT RUN_DIR`: measure, draw, write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alignx_ds.runtime import console, distributed
from alignx_ds.study import calibration, contributions, drift, forgetting, record
from alignx_ds.study.subject import Subject

Measure = Callable[[Subject], dict[str, Any]]
Draw = Callable[[dict[str, Any]], Figure]
STUDIES: dict[str, tuple[Measure, Draw, Callable[[dict[str, Any]], None]]] = {
    "drift": (drift.measure, drift.draw, drift.show),
    "forgetting": (forgetting.measure, forgetting.draw, forgetting.show),
    "contributions": (contributions.measure, contributions.draw, contributions.show),
    "calibration": (calibration.measure, calibration.draw, calibration.show),
}


def study(what: str, directory: Path, out: Path | None) -> list[Path]:
    """The files that were written. Raises ConfigError when the directory holds no finished run."""
    distributed.silence_libraries()
    target = out if out is not None else directory / "study"
    subject = Subject.of(directory)
    record.check_writable(target)
    measure, draw, show = STUDIES[what]
    content = record.circumstances(what, directory, subject.config.seed) | measure(subject)
    show(content)
    written = record.write(what, content, draw(content), target)
    console.say("written: " + ", ".join(str(path) for path in written))
    return written
