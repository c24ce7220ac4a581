"""Stage 1 on objectives, under ZeRO-3 and ZeRO-2: any number of ranks trains the same, and so does a resumed job."""

from __future__ import annotations

import numpy as np
import pytest
from objectives import OBJECTIVES
from worlds import Runs


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_two_ranks_train_what_one_does(name: str, runs: Runs) -> None:
    """The shifts of kto and bco too, which are of all rows of a step: of two micro batches, or of two ranks."""
    (alone,), (first, second) = runs.of(1, "objectives"), runs.of(2, "objectives")
    np.testing.assert_allclose(first[name]["losses"], alone[name]["losses"], rtol=1e-4)
    assert second[name]["losses"] == first[name]["losses"]
    for p, change in alone[name]["vector"].items():
        assert float(change.abs().max()) > 1e-2
        assert float((first[name]["vector"][p] - change).abs().max()) < 2e-4
    for ours, theirs in zip(alone[name]["curves"], first[name]["curves"], strict=True):
        for metric in (metric for metric in ours if metric.startswith(("rewards", "log_probabilities"))):
            assert theirs[metric] == pytest.approx(ours[metric], rel=1e-3, abs=1e-4), metric


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_resumed_job_ends_where_an_uninterrupted_one_does(name: str, world: int, runs: Runs) -> None:
    """Its reference is that of the untrained weights, not of those that its checkpoint has."""
    for part in runs.of(world, "objectives"):
        assert part[name]["resumed"] == part[name]["losses"]
        assert part[name]["same files"]


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_its_curve_tells_good_answers_from_bad_ones(name: str, runs: Runs) -> None:
    (part,) = runs.of(1, "objectives")
    first, *_, last = part[name]["curves"]
    assert first["rewards/good"] == pytest.approx(0, abs=1e-5), "trained weights are the reference's at the start"
    assert first["rewards/bad"] == pytest.approx(0, abs=1e-5)
    assert last["rewards/margin"] == pytest.approx(last["rewards/good"] - last["rewards/bad"], rel=1e-4, abs=1e-6)
    assert last["rewards/margin"] > 0 and last["log_probabilities/good"] < 0 and "rewards/accuracy" in last
