"""The ranks that these tests start, which they share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    from problems import write_base, write_specialists
    from worlds import Runs

    root = tmp_path_factory.mktemp("ranks")
    write_base(root / "base")
    write_specialists(root)
    return Runs(root)
