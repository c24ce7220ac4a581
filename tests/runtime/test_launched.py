"""Which variables mean that a launcher has started this process, which are leftovers, and which can't be right."""

from __future__ import annotations

import os

import pytest

from alignx_ds.runtime import distributed, launched
from alignx_ds.runtime.launched import Launched

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.mark.parametrize(
    ("given", "place", "wrong"),
    [
        ({}, None, []),
        ({"WORLD_SIZE": "1"}, None, []),
        ({"RANK": "0"}, None, []),
        ({"LOCAL_RANK": "3", "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "none"}, None, []),
        ({"WORLD_SIZE": "4"}, None, ["WORLD_SIZE"]),
        ({"RANK": "1"}, None, ["RANK"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None, ["RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "two"}, None, ["WORLD_SIZE"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, None, ["RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "none"}, None, ["MASTER_PORT"]),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launched(0, 1, 0), []),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launched(5, 8, 1), []),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Launched(1, 2, 0), []),
    ],
)
def test_a_launcher_s_variables(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], place: Launched | None, wrong: list[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launched.launched() == place
    assert [problem.key for problem in launched.problems()] == wrong
    assert distributed.planned_world_size(3) == (place.world_size if place else 3)
    assert distributed.is_main() == (place is None or place.rank == 0)


def test_a_process_that_is_alone_meets_nobody_at_a_leftover_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    distributed._set_rank_variables()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 1024
