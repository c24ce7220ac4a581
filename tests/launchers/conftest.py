"""Lets these tests import each other's parts, and share one run on one node that every launcher has to come up to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of launch/local.sh, both stages."""
    from jobs import RECIPE, SMALL, finished

    output = tmp_path_factory.mktemp("one-node") / "run"
    finished("launch/local.sh", RECIPE, *SMALL, f"output={output}", VERB="align", RANKS="2")
    return output
