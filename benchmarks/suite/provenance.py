"""Results of benchmarks without a model shape, for which `record` would need one."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the content as JSON, after date, command and versions."""
    provenance = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
        "python": platform.python_version(),
        "scikit-learn": version("scikit-learn"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance | content, indent=2) + "\n", encoding="utf-8")
