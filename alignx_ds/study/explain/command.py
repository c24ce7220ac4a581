"""`alignx-ds explain RUN_DIR "a prompt"`: every decision about every prompt, in numbers, in words and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.runtime import distributed
from alignx_ds.study.explain import picture, wording
from alignx_ds.study.explain.explanation import as_data, explain
from alignx_ds.study.explain.finished import FinishedRun


def show(directory: Path, prompts: list[str], out: Path | None, *, as_json: bool) -> None:
    """Print the explanation, as text or as JSON, and draw it into `out`. Raises ConfigError."""
    if unfit := [p for p in prompts if not _is_text(p)]:
        raise ConfigError(Problem("prompt", unfit[0], "text", "it is not valid UTF-8; type it anew"))
    distributed.silence_libraries()
    explanation = explain(FinishedRun.open(directory), prompts)
    folder = out or directory / "explain"
    try:
        drawn = picture.write(explanation.prompts, folder)
    except OSError as error:
        fix = f"it can't be written ({error.strerror}); choose another --out"
        raise ConfigError(Problem("--out", str(folder), "a writable directory", fix)) from error
    if as_json:
        print(json.dumps(as_data(explanation) | {"pictures": [str(path) for path in drawn]}, indent=2))
    else:
        wording.show(explanation, drawn)


def _is_text(prompt: str) -> bool:
    """A terminal may pass bytes that are no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True
