"""The ranks that these tests start, which they share."""

from __future__ import annotations

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """The first test that asks for a world size waits for all of its jobs; `worlds.TIMEOUT` ends them before."""
    if "runs" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    from problems import write_base, write_specialists
    from worlds import Runs

    root = tmp_path_factory.mktemp("ranks")
    write_base(root / "base")
    write_specialists(root)
    return Runs(root)
