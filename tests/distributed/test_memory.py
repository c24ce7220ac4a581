"""A run trains about ten models in one process: nothing of an engine is left in memory once its job is done."""

from __future__ import annotations

import pytest
from worlds import Runs


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_of_an_engine_is_left_after_its_job(runs: Runs, world: int) -> None:
    for part in runs.of(world, "freed"):
        assert part.keys() == {"zero1", "zero2", "zero3", "h3fusion", "trinityx", "stage2", "stage2, ZeRO-3"}
        assert {job: left for job, left in part.items() if left} == {}
