"""The restored baseline: the sequential fine-tune, but for weights that a specialist has."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from worlds import Runs

from alignx_ds.stages.restore import ROUNDS, SHARE


@pytest.mark.parametrize("world", [1, 2])
def test_it_has_lost_less_than_the_sequential_one(world: int, runs: Runs) -> None:
    """The first axis is the one that is restored first; the result is the best round."""
    facts = runs.of(world, "restoring")[0]["manifest"]
    start, *rounds = facts["rounds"]
    assert len(rounds) == ROUNDS and rounds[0]["restored"] == "a"
    assert rounds[0]["losses"]["a"] < start["losses"]["a"]
    means = [mean(seen["losses"].values()) for seen in facts["rounds"]]
    assert facts["chosen"] == means.index(min(means)) > 0


@pytest.mark.parametrize("world", [1, 2])
def test_every_weight_is_the_sequential_one_s_or_a_specialist_s(world: int, runs: Runs) -> None:
    part = runs.of(world, "restoring")[0]
    vectors, changed = part["vectors"], 0
    for made, *others in zip(*(vectors[name] for name in ("restored", "sequential", "a", "b")), strict=True):
        for p, change in made.items():
            assert torch.stack([change == other[p] for other in others]).any(0).all()
            restored = (change != others[0][p]).sum()
            assert restored <= part["manifest"]["chosen"] * max(1, round(SHARE * change.numel()))
            changed += int(restored)
    assert changed > 0


def test_two_ranks_restore_what_one_does(runs: Runs) -> None:
    (alone,), (first, second) = runs.of(1, "restoring"), runs.of(2, "restoring")
    assert first["manifest"]["files"] == second["manifest"]["files"]
    for ours, theirs in zip(alone["manifest"]["rounds"][:4], first["manifest"]["rounds"][:4], strict=True):
        assert ours["restored"] == theirs["restored"]
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3)
