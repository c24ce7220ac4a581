"""The learning rate's schedules: the project's own, those of transformers, and those that a DeepSpeed JSON can ask for.

A schedule is a function of the number of optimizer steps made so far. Its value is the factor of every parameter
group's own peak learning rate in the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from alignx_ds.config.choices import COSINE_TO_TENTH

Schedule = Callable[[int], float]
DEEPSPEED_SCHEDULERS = {  # their parameters, with DeepSpeed's defaults; None: the recipe has the value
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": None, "warmup_num_steps": None, "warmup_type": "log"},
    "WarmupDecayLR": {
        **{"warmup_min_lr": 0.0, "warmup_max_lr": None, "warmup_num_steps": None, "warmup_type": "log"},
        **{"total_num_steps": None},
    },
    "WarmupCosineLR": {
        **{"warmup_min_ratio": 0.0, "cos_min_ratio": 1e-4, "warmup_num_steps": None, "warmup_type": "log"},
        **{"total_num_steps": None},
    },
}


def named(name: str, warmup_steps: int, steps: int) -> Schedule:
    """The schedule of a recipe: the project's own, or that of transformers' `get_scheduler` with this name."""
    if name == COSINE_TO_TENTH:
        return warmup_and_cosine(warmup_steps, steps)
    from transformers import get_scheduler

    one = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)  # its rates are the factors
    made: Schedule = get_scheduler(name, one, num_warmup_steps=warmup_steps, num_training_steps=steps).lr_lambdas[0]
    return made


def warmup_and_cosine(warmup_steps: int, steps: int) -> Schedule:
    """Linear warm-up to the peak, then a cosine to a tenth of it at `steps`.

    The first step has 1/warmup_steps of the peak, the last warm-up step all of it. (transformers'
    get_cosine_with_min_lr_schedule_with_warmup begins at 0, a step without effect.)
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


def of_deepspeed(kind: str, params: dict[str, Any]) -> Schedule:
    """The schedule of `deepspeed.runtime.lr_schedules` with that name; `params` has a value for each of its parameters.

    DeepSpeed's own classes give all parameter groups one rate, and can't be restored at another number of ranks.
    """
    warmup = max(2, int(params["warmup_num_steps"]))
    lowest: float = (
        params["warmup_min_ratio"] if kind == "WarmupCosineLR" else params["warmup_min_lr"] / params["warmup_max_lr"]
    )
    floor, total = float(params.get("cos_min_ratio", 0)), int(params.get("total_num_steps", 0))
    rest = max(1, total - warmup)  # steps after the warm-up

    def factor(step: int) -> float:
        made = step - 1  # DeepSpeed's count is one behind: its first two steps have the lowest rate
        if made < 0:
            return 0.0 if kind == "WarmupCosineLR" else lowest
        if made < warmup:
            rise = made / warmup if params["warmup_type"] == "linear" else math.log(made + 1) / math.log(warmup)
            return lowest + (1 - lowest) * rise
        if kind == "WarmupDecayLR":
            return lowest + (1 - lowest) * max(0.0, (total - made) / rest)
        if kind == "WarmupCosineLR":
            cosine = (1 + math.cos(math.pi * min(1.0, (made - warmup + 1) / rest))) / 2
            return floor + (1 - floor) * cosine
        return 1.0

    return factor
