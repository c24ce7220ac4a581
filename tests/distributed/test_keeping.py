"""The terms that keep what was learned before: under any ZeRO stage and number of ranks they are what they say."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from keeping import KEEP, STAGES, kept_in_plain_torch
from worlds import Runs

expected = cache(kept_in_plain_torch)


@pytest.mark.parametrize(("world", "stage"), [(world, stage) for world, stages in STAGES.items() for stage in stages])
def test_both_terms_are_plain_torch_s(stage: int, world: int, runs: Runs) -> None:
    for part in (found[stage] for found in runs.of(world, "keeping")):
        np.testing.assert_allclose(part["losses"], expected()["losses"], rtol=1e-4)
        for made, plain, own in zip(
            part["vectors"]["kept"], part["vectors"]["plain"], expected()["vectors"].values(), strict=True
        ):
            for p, change in made.items():
                assert float((change - own[p]).abs().max()) < 2e-4
                assert float((change - plain[p]).abs().max()) > 1e-2, "without the terms it ends elsewhere"


@pytest.mark.parametrize("world", [1, 2])
def test_the_curve_has_the_terms(world: int, runs: Runs) -> None:
    """Unweighted, at the weights before each step: none at the start; at the end they are less than without them."""
    for stage, part in runs.of(world, "keeping")[0].items():
        first, *_, last = part["curves"]
        assert first["keep/fisher"] == first["keep/collision"] == 0, stage
        assert last["keep/fisher"] > 0 and last["keep/collision"] > 0
        assert _along(part, "kept") < 0.5 * _along(part, "plain")


def _along(part: dict[str, Any], name: str) -> float:
    """How far a second fine-tune has moved along the first one's task vector."""
    vectors = part["vectors"]
    pairs = [(v[p] - f[p], f[p]) for v, f in zip(vectors[name], vectors["first"], strict=True) for p in f]
    return sum(float((change * first / first.norm()).sum()) ** 2 for change, first in pairs)


@pytest.mark.parametrize("world", [1, 2])
def test_a_stopped_job_resumes_to_the_same_result(world: int, runs: Runs) -> None:
    """What it keeps is what its start was, not what its checkpoint has."""
    assert KEEP.is_on
    for found in runs.of(world, "keeping"):
        assert all(part["same files"] for part in found.values())
