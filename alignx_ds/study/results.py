"""The files that a study writes: NAME.json with every number of the figure, NAME.png and NAME.pdf with the figure.

What the systems have answered, if the study keeps it, is in NAME.answers.jsonl, with a line for each answer.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.runs import manifest
from alignx_ds.runtime.versions import version

PACKAGES = ("alignx-ds", "torch", "deepspeed", "transformers", "scikit-learn")
PROVENANCE = ("study", "date", "command", "seed", "hardware", "versions")
DPI = 130
EVERY_ANSWER = "every_answer"  # the part of a study's content that has a file of its own, NAME.answers.jsonl


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {os.cpu_count()} cores, no GPU"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def provenance(
    what: str, directories: Sequence[Path], seed: int | list[int], arguments: Sequence[str] = ()
) -> dict[str, Any]:
    """When, by which command (the `arguments` follow the directories) and on which machine; its keys are PROVENANCE.

    Of an absolute path only the last part is recorded.
    """
    named = [directory.name if directory.is_absolute() else directory.as_posix() for directory in directories]
    return {
        "study": what,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["alignx-ds", "study", what, *named, *arguments]),
        "seed": seed,
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def check_writable(out: Path) -> None:
    """Raises ConfigError when the results could not be written."""
    there = next((path for path in (out, *out.parents) if path.exists()), out)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(Problem("--out", str(out), "a directory that can be written to", "choose another"))


def write(what: str, content: dict[str, Any], figure: Figure, out: Path) -> list[Path]:
    """Write the results into `out`; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / f"{what}.json"]
    numbers = {key: value for key, value in content.items() if key != EVERY_ANSWER}
    text = json.dumps(finite(numbers), indent=1, ensure_ascii=False, allow_nan=False)
    manifest.write_text(written[0], text + "\n")
    if EVERY_ANSWER in content:
        written.append(out / f"{what}.answers.jsonl")
        lines = (json.dumps(finite(line), ensure_ascii=False, allow_nan=False) for line in content[EVERY_ANSWER])
        manifest.write_text(written[-1], "".join(f"{line}\n" for line in lines))
    for suffix, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        written.append(out / f"{what}.{suffix}")
        figure.savefig(written[-1], dpi=DPI, bbox_inches="tight", metadata=metadata)
    return written


def finite(value: Any) -> Any:
    """The same value, with null for every number that JSON can't hold."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
