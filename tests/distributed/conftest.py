"""Lets these tests import the tiny models and each other's parts, and share the ranks that they start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "mocae")]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    from problems import write_base, write_specialists
    from worlds import Runs

    root = tmp_path_factory.mktemp("ranks")
    write_base(root / "base")
    write_specialists(root)
    return Runs(root)
