"""Faults in real runs. `make faults` runs them all and makes the table of docs/reliability.md of what they record."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HERE = Path(__file__).parent
if TYPE_CHECKING:
    from recording import Record

sys.path.insert(0, str(HERE.parent / "distributed"))


@pytest.fixture
def record() -> Record:
    """`record(area, fault, seen, lost)`, once everything has been asserted."""
    from recording import write

    return write


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """`@pytest.mark.tried(…)` adds a row to the table if the test passes; nothing is lost in those faults."""
    outcome = yield
    from recording import write

    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" and report.passed:
        for mark in item.iter_markers("tried"):
            write(*mark.args, "–")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """By verb: the output directory of a run that nothing has disturbed."""
    from command import Command

    made: dict[str, Path] = {}

    def of(verb: str) -> Path:
        if verb not in made:
            output = tmp_path_factory.mktemp("undisturbed") / verb
            ended = Command(verb, output).start()
            assert ended.well, ended.console
            made[verb] = output
        return made[verb]

    return of
