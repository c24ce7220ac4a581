"""A run on one node, whose results every launcher has to reproduce."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of launch/local.sh after stage 1."""
    from jobs import RECIPE, SMALL, finished

    output = tmp_path_factory.mktemp("one-node") / "run"
    finished("launch/local.sh", RECIPE, *SMALL, f"output={output}", VERB="specialists", RANKS="2")
    return output


@pytest.fixture(scope="session")
def one_node_aligned(one_node: Path) -> Path:
    """The same output after stage 2."""
    from jobs import RECIPE, SMALL, finished

    finished("launch/local.sh", RECIPE, *SMALL, f"output={one_node}", VERB="align", RANKS="2")
    return one_node
