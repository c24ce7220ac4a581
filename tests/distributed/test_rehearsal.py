"""The largest micro batch, which is tried before the first step, leaves no trace under any ZeRO stage."""

from __future__ import annotations

import torch
from worlds import Runs


def test_a_job_trains_the_same_after_its_rehearsal(runs: Runs) -> None:
    for part in runs.of(2, "rehearsed"):
        assert len(part) == 5
        for job, ((losses, weights, facts), tried) in part.items():
            assert all(loss is not None for loss in losses), job
            assert tried[0] == losses and tried[2] == facts, job
            assert weights.keys() == tried[1].keys() and weights
            assert all(torch.equal(weights[name], tried[1][name]) for name in weights), job
