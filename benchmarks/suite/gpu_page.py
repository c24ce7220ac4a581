"""docs/gpu.md, written from the results of benchmarks/gpu.py."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, results: Path) -> None:
    pass
