"""The one training loop: both stages and every baseline run through `train`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from alignx_ds import distributed, signals
from alignx_ds.console import Progress
from alignx_ds.data.encode import Batch, Example, collate, pack
from alignx_ds.data.sampler import global_batches, share
from alignx_ds.training.engine import Plan
from alignx_ds.training.keeper import Keeper

STOP = "stop"  # whether a rank was asked to end travels with the step's figures


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of one accumulation step.

    `experts` [B] is the expert that each row belongs to. `lm_scale` turns this part's summed NLL into its share of
    the global mean over answer tokens, given that DeepSpeed averages over ranks and accumulation steps.
    """

    batch: Batch
    experts: Tensor
    lm_scale: float
    examples: tuple[Example, ...] = ()  # what the batch was made of,
    numbers: tuple[int, ...] = ()  # and which of all rows they are


@dataclass(frozen=True)
class Rows:
    """Encoded rows with the expert that each belongs to."""

    examples: list[Example]
    experts: list[int]


StepLoss = Callable[[Any, MicroBatch], tuple[Tensor, dict[str, float]]]
Batches = Callable[[int], Iterator[list[MicroBatch]]]  # from the number of steps already made


def micro_batches(
    rows: Rows, plan: Plan, pad_id: int, seed: int, start: int = 0, *, packed: bool = False
) -> Iterator[list[MicroBatch]]:
    """For each optimizer step after `start`, this rank's micro batches. The global batch is the same at any world size.

    Packed, several rows share a line: less padding, the same loss; not for steps that route each row by itself.
    """
    world, rank, device = distributed.world_size(), distributed.rank(), distributed.device()
    for chosen in islice(global_batches(len(rows.examples), plan.batch, plan.steps, seed), start, None):
        answer_tokens = max(1, sum(rows.examples[i].answer_length for i in chosen))
        own = share(chosen, rank, world)
        size = plan.micro_batch(world)
        scale = world * plan.accumulation / answer_tokens
        step = []
        for first in range(0, len(own), size):
            part = tuple(own[first : first + size])
            examples = [rows.examples[i] for i in part]
            batch = pack(examples, pad_id) if packed else collate(examples, pad_id)
            experts = torch.tensor([rows.experts[i] for i in part], device=device)
            step.append(MicroBatch(batch.to(device), experts, scale, tuple(examples), part))
        yield step


def train(
    engine: Any, batches: Batches, step_loss: StepLoss, plan: Plan, progress: Progress, keeper: Keeper
) -> list[float | None]:
    """Run the plan, from where the keeper's checkpoint left off.

    Returns the loss of every step, averaged over micro batches and ranks; None for a step that was skipped because
    its loss or gradient was not finite. Raises Stopped when a signal has asked for the end.
    """
    engine.train()
    losses = keeper.restore(engine)
    progress.advance(by=len(losses))
    for parts in batches(len(losses)):
        seen, terms = list[Tensor](), dict[str, float]()
        for part in parts:
            loss, logged = step_loss(engine, part)
            engine.backward(_marked(loss))
            engine.step()
            seen.append(loss.detach())
            for name, value in logged.items():
                terms[name] = terms.get(name, 0.0) + value / len(parts)
        each = [float(loss) for loss in seen]  # asked of the device once the whole step is under way
        asked = {STOP: float(signals.asked())}
        mean = _mean_over_ranks({"loss": sum(each) / len(parts), **terms, **asked})
        stop = mean.pop(STOP) > 0
        applied = engine.was_step_applied()
        losses.append(mean["loss"] if applied else None)
        if not applied:
            keeper.not_finite(engine, losses, _suspects(parts, each))
        keeper.after_step(engine, losses, mean, plan.steps, stop)
        progress.advance(f"loss {mean['loss']:.3f}")
    return losses


def _marked(loss: Tensor) -> Tensor:
    """A loss that is not finite makes all its gradients so, and DeepSpeed's own check skips the step on every rank.

    The host does not ask which it is: it would wait for the forward pass, with nothing of the backward pass under way.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def _suspects(parts: list[MicroBatch], losses: list[float]) -> list[MicroBatch]:
    """This rank's micro batches with a loss that is not finite; where no rank has one, all of them."""
    found = [part for part, loss in zip(parts, losses, strict=True) if not math.isfinite(loss)]
    return found if any(distributed.gather(bool(found))) else parts


def _mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    if distributed.world_size() == 1:
        return values
    stacked = torch.tensor(list(values.values()), device=distributed.device())
    torch.distributed.all_reduce(stacked)
    return dict(zip(values, (stacked / distributed.world_size()).tolist(), strict=True))
