"""The schedules against those of DeepSpeed, step by step, and by the formulas of transformers' own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from torch.optim import AdamW

from alignx_ds.config.choices import SCHEDULES
from alignx_ds.config.parse import substance
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


WARMUP = 3
AFTER: dict[str, Callable[[int], float]] = {  # the factor of the peak, so many steps after the warm-up
    "linear": lambda n: 1 - n / (STEPS - WARMUP),
    "cosine": lambda n: (1 + math.cos(math.pi * n / (STEPS - WARMUP))) / 2,
    "constant_with_warmup": lambda n: 1.0,
    "inverse_sqrt": lambda n: math.sqrt(WARMUP / (WARMUP + n)),
    "cosine_to_tenth": lambda n: 0.1 + 0.45 * (1 + math.cos(math.pi * n / (STEPS - WARMUP))),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_recipe_s_schedule_by_name(name: str) -> None:
    """Those of transformers begin at 0; every parameter group has its own peak."""
    plan = Plan.of(TrainConfig(lr=LR, warmup_steps=WARMUP, schedule=name), "float32", STEPS)
    first = 1 if name == "cosine_to_tenth" else 0
    expected = [(n + first) / WARMUP for n in range(WARMUP)] + [
        AFTER.get(name, float)(n) for n in range(STEPS - WARMUP)
    ]
    if name == "constant":
        expected = [1.0] * STEPS
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = AdamW([{"params": [weights[0]], "lr": LR}, {"params": [weights[1]], "lr": LR / 4}])
    scheduler = schedule(plan)(optimizer)
    for factor in expected:
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([factor * LR, factor * LR / 4])
        optimizer.step()
        scheduler.step()


def test_a_result_of_the_own_schedule_is_one_from_before_there_were_others() -> None:
    assert "schedule" not in substance(TrainConfig())
    assert substance(TrainConfig(schedule="linear"))["schedule"] == "linear"
