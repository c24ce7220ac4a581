"""One micro batch before the first optimizer step, so that a lack of memory shows at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from alignx_ds.data.batches import MicroBatch
from alignx_ds.runtime import attention, distributed
from alignx_ds.runtime.deepspeed import without_warnings
from alignx_ds.training.metrics import MicroBatchLoss
from alignx_ds.training.state import COUNTERS


def rehearse(engine: Any, part: MicroBatch, step_loss: Callable[[Any, MicroBatch], MicroBatchLoss]) -> None:
    """Forward and backward pass of one micro batch in a fresh engine, which is left as it was. Collective.

    The loss is multiplied by NaN, so that DeepSpeed drops the gradients and skips the step. The counters that it
    changes are set back, and so are torch's random number generators.
    """
    device, counters = distributed.device(), {name: getattr(engine, name) for name in COUNTERS}
    unchanged = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with unchanged, attention.planning_pays(), without_warnings():
        engine.set_gradient_accumulation_boundary(is_boundary=True)
        engine.backward(step_loss(engine, part).loss * math.nan)
        engine.step()
        engine._is_gradient_accumulation_boundary = None  # DeepSpeed counts micro batches again
    assert not engine.was_step_applied(), "a step whose gradients are NaN changes no weight"
    for name, value in counters.items():
        setattr(engine, name, value)
