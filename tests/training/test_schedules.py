"""The schedules against those of DeepSpeed, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from torch.optim import AdamW

from alignx_ds.config.schema import TrainConfig
from alignx_ds.training.engine import Plan, fill, schedule

STEPS, LR = 12, 0.5


@pytest.mark.parametrize("warmup_type", ["log", "linear"])
@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("WarmupLR", {}),
        ("WarmupLR", {"warmup_min_lr": 0.1}),
        ("WarmupDecayLR", {"warmup_min_lr": 0.1}),
        ("WarmupCosineLR", {}),
        ("WarmupCosineLR", {"warmup_min_ratio": 0.2, "cos_min_ratio": 0.3}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_scheduler_of_a_json_gives_the_rates_that_deepspeed_s_own_gives(
    kind: str, extra: dict[str, Any], warmup_type: str, warmup: int
) -> None:
    """For every parameter group relative to its own peak."""
    plan = Plan.of(TrainConfig(lr=LR, warmup_steps=warmup), "float32", STEPS)
    block = {"type": kind, "params": {**extra, "warmup_type": warmup_type}}
    filled = fill({"scheduler": block}, plan, 1)["scheduler"]
    params = filled["params"] | {"warmup_num_steps": max(1, warmup)}  # DeepSpeed refuses 0
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = AdamW([weight], lr=LR)
    ours = AdamW([{"params": [weight], "lr": LR}, {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": LR / 4}])
    scheduler, expected = schedule(plan, filled)(ours), getattr(lr_schedules, kind)(theirs, **params)
    for _ in range(STEPS + 2):
        rate = theirs.param_groups[0]["lr"]
        assert [group["lr"] for group in ours.param_groups] == pytest.approx([rate, rate / 4])
        ours.step()
        scheduler.step()
        expected.step()
