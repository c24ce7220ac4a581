"""A run's report.json, as other commands read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignx_ds.errors import DataError
from alignx_ds.runs import manifest

KEYS = frozenset({"systems", "router", "collapse", "perplexity", "scored"})


def read_report(directory: Path) -> dict[str, Any]:
    """The content of a run's report.json. Raises DataError when there is none, or something else."""
    path = directory / "report.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the output directory of a finished run") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON at line {error.lineno}; give the command that made the run again") from error
    if not isinstance(content, dict) or not set(content) >= KEYS or "base" not in content["systems"]:
        raise DataError(f"{path}: not the report of a run; give the output directory of a finished run")
    return content


def is_current(directory: Path, report: dict[str, Any]) -> bool:
    """Whether the report is on the model beside it, and not on one that was there before. Raises DataError."""
    model = directory / "model"
    if "model" not in report or not (model / manifest.NAME).is_file():  # of an earlier version, or a report alone
        return True
    return bool(manifest.read(model)["fingerprint"] == report["model"])
