"""The table of docs/reliability.md: tests record what they have seen, as lines of JSON in the file FAULTS_RECORD."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

Record = Callable[..., None]


def write(area: str, fault: str, seen: str, lost: str = "nothing") -> None:
    """A line of the table."""
    if path := os.environ.get("FAULTS_RECORD"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"area": area, "fault": fault, "seen": seen, "lost": lost}) + "\n")
