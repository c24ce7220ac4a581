"""A run's report.json, as other commands read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignx_ds.errors import DataError

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
