"""Lets these tests import the benchmarks' parts and the tiny models."""

from __future__ import annotations

import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path[:0] = [str(REPO / "benchmarks"), str(REPO / "tests" / "mocae")]
