"""The one training loop, which all stages and baselines share, and the micro batches that it is fed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from alignx_ds.data.batches import MicroBatch, collate, pack
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.data.sampling import global_batches, share
from alignx_ds.errors import Stopped
from alignx_ds.runtime import attention, distributed, signals
from alignx_ds.runtime.console import Progress
from alignx_ds.training.engine import Plan
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.metrics import Losses, MicroBatchLoss, StepMetrics, step_metrics

StepLoss = Callable[[Any, MicroBatch], MicroBatchLoss]  # takes the engine
Batches = Callable[[int], Iterator[list[MicroBatch]]]  # takes the number of steps already made


def micro_batches(
    rows: LabelledExamples, plan: Plan, pad_id: int, seed: int, start: int = 0, *, packed: bool = False
) -> Iterator[list[MicroBatch]]:
    """For each optimizer step after the first `start`, this rank's micro batches, on this rank's device.

    The rows of a global batch depend on the seed and the step alone, not on the world size. `pad_id` is the padding
    token's id. With `packed`, several rows share a line of the batch: less padding and the same loss, but only for a
    model that does not route each row by itself.
    """
    world, rank, device = distributed.world_size(), distributed.rank(), distributed.device()
    needs, weights = rows.multi_hot(rows.width), rows.weights()
    multiple, longest = attention.width_multiple(device), max((len(e.ids) for e in rows.examples), default=0)
    for chosen in islice(global_batches(len(rows.examples), plan.batch, plan.steps, seed), start, None):
        answer_tokens = max(1, sum(rows.examples[i].learned_length for i in chosen))
        own = share(chosen, rank, world)
        size = plan.micro_batch(world)
        assert len(own) == size * plan.accumulation, "rows of unequal micro batches would not count alike"
        scale = world * plan.accumulation / answer_tokens
        step = []
        for first in range(0, len(own), size):
            part = tuple(own[first : first + size])
            examples = [rows.examples[i] for i in part]
            batch = pack(examples, pad_id, multiple, longest) if packed else collate(examples, pad_id)
            experts = torch.tensor([rows.experts[i] for i in part], device=device)
            needed = needs[list(part)].to(device)
            weight = None if weights is None else weights[list(part)].to(device)
            step.append(
                MicroBatch(batch.to(device), experts, needed, scale, tuple(examples), part, gate_weights=weight)
            )
        yield step


def train(
    engine: Any, batches: Batches, step_loss: StepLoss, plan: Plan, progress: Progress, job: TrainingJob
) -> Losses:
    """Make the optimizer steps of the plan, from where the job's newest checkpoint leaves off. Collective.

    `engine` is a DeepSpeed engine. `batches` yields this rank's micro batches, step by step. `step_loss` runs the
    forward pass of one micro batch.

    Returns the loss of every step, averaged over micro batches and ranks; None for a step that was skipped because
    its loss or gradient was not finite. Raises Stopped, after a checkpoint, when a signal has asked for the end, and
    DataError when a step is not finite and may not be skipped.
    """
    engine.train()
    losses = job.checkpoints.restore(engine) if job.checkpoints else []
    progress.advance(by=len(losses))
    for parts in batches(len(losses)):
        outputs = []
        with attention.planning_pays():
            for part in parts:
                output = step_loss(engine, part)
                engine.backward(_spread_nonfinite(output.loss))
                engine.step()
                outputs.append(replace(output, loss=output.loss.detach()))
        metrics, stop = step_metrics(outputs, stop=signals.stop_requested())
        applied = engine.was_step_applied()
        losses.append(metrics.loss if applied else None)
        if not applied:
            job.nonfinite.handle(job.name, losses, _suspects(parts, outputs), partial(job.save, engine, losses[:-1]))
        _log(job, len(losses), metrics)
        if job.checkpoints:
            job.checkpoints.after_step(engine, losses, stop=stop)
        if stop:
            raise Stopped(f"{job.name}, after step {len(losses)} of {plan.steps}")
        progress.advance(f"loss {metrics.loss:.3f}")
    return losses


def _log(job: TrainingJob, step: int, metrics: StepMetrics) -> None:
    values = job.scalars(metrics).items()
    job.log(step, {name: value for name, value in values if math.isfinite(value)})


def _spread_nonfinite(loss: Tensor) -> Tensor:
    """NaN for a loss that is not finite: all its gradients become NaN, so DeepSpeed skips the step on every rank.

    The device decides. If the host did, it would wait for the forward pass before it launches the backward pass.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def _suspects(parts: list[MicroBatch], outputs: list[MicroBatchLoss]) -> list[MicroBatch]:
    """This rank's micro batches with a loss that is not finite; where no rank has one, all of them."""
    found = [p for p, output in zip(parts, outputs, strict=True) if not math.isfinite(float(output.loss))]
    return found if any(distributed.gather(bool(found))) else parts
