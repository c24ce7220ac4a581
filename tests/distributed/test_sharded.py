"""A trunk that is spread over the ranks gives what the whole one gives, in all that a run does with its models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import Runs

SYSTEMS = ("merged", "trained", "alignx", "tied, bfloat16", "fused, bfloat16")


@pytest.mark.parametrize("system", SYSTEMS)
def test_logits_answers_and_likelihoods_are_those_of_the_whole_model(runs: Runs, system: str) -> None:
    for part in runs.of(2, "sharded"):
        whole, sharded = part["whole"][system], part["sharded"][system]
        assert whole["held"] == 1.0
        assert sharded["held"] < 0.6, "half of the trunk; gates and experts are whole"
        assert sharded["answers"] == whole["answers"]
        assert sharded["likelihoods"] == pytest.approx(whole["likelihoods"], abs=1e-5)
        _assert_equal({"logits": sharded["logits"]}, {"logits": whole["logits"]})
        _assert_equal(sharded["state"], whole["state"])


def test_stage_2_fits_and_trains_the_same_mixture(runs: Runs) -> None:
    for part in runs.of(2, "sharded"):
        assert part["sharded"]["losses"] == pytest.approx(part["whole"]["losses"], rel=1e-6)


def test_what_a_sharded_model_saves_is_loaded_whole(runs: Runs) -> None:
    for part in runs.of(2, "sharded"):
        assert part["reloaded"]["held"] == 1.0
        _assert_equal(part["reloaded"]["state"], part["sharded"]["alignx"]["state"])
        _assert_equal({"logits": part["reloaded"]["logits"]}, {"logits": part["sharded"]["alignx"]["logits"]})


def _assert_equal(made: dict[str, Any], expected: dict[str, Any]) -> None:
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
