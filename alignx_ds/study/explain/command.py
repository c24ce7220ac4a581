"""`alignx-ds explain RUN_DIR "a prompt"`: print and plot the gates' decisions and every system's answers."""

from __future__ import annotations

import json
from pathlib import Path

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.runtime import distributed
from alignx_ds.study.explain import plot, text
from alignx_ds.study.explain.explanation import as_data, explain


def show(directory: Path, prompts: list[str], out: Path | None, *, as_json: bool) -> None:
    """Print the explanation, as text or as JSON, and plot it into `out`. Raises ConfigError or DataError."""
    if unfit := [p for p in prompts if not _is_text(p)]:
        raise ConfigError(Problem("prompt", unfit[0], "text", "it is not valid UTF-8; correct it"))
    distributed.silence_libraries()
    explanation = explain(FinishedRun.open(directory), prompts)
    folder = out or directory / "explain"
    try:
        plots = plot.write(explanation.prompts, folder)
    except OSError as error:
        fix = f"it can't be written ({error.strerror}); choose another --out"
        raise ConfigError(Problem("--out", str(folder), "a writable directory", fix)) from error
    if as_json:
        print(json.dumps(as_data(explanation) | {"pictures": [str(path) for path in plots]}, indent=2))
    else:
        text.show(explanation, plots)


def _is_text(prompt: str) -> bool:
    """A shell may pass bytes that are not valid UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True
