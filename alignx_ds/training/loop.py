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
from alignx_ds.runtime import attention, console, distributed, signals
from alignx_ds.runtime.console import Progress
from alignx_ds.training.engine import Plan
from alignx_ds.training.evaluation import Evaluation
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.metrics import Losses, MicroBatchLoss, step_metrics
from alignx_ds.training.rehearsal import rehearse
from alignx_ds.training.speed import Stopwatch, own_tokens

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
    build = builder(rows, pad_id, packed=packed)
    world = distributed.world_size()
    for chosen in islice(global_batches(len(rows.examples), plan.batch, plan.steps, seed), start, None):
        answer_tokens = max(1, sum(rows.examples[i].learned_length for i in chosen))
        scale = world * plan.accumulation / answer_tokens
        yield [build(part, scale) for part in _parts(chosen, plan)]


def largest_micro_batch(
    rows: LabelledExamples, plan: Plan, pad_id: int, seed: int, *, packed: bool = False
) -> MicroBatch:
    """That of this rank's micro batches which has the most tokens, padding included; the first of several."""

    def size(part: tuple[int, ...]) -> int:
        lengths = [len(example.ids) for example in rows.at(part)]
        return sum(lengths) if packed else len(lengths) * max(lengths)

    steps = global_batches(len(rows.examples), plan.batch, plan.steps, seed)
    largest = max((part for chosen in steps for part in _parts(chosen, plan)), key=size)
    return builder(rows, pad_id, packed=packed)(largest, 1.0)


def _parts(chosen: list[int], plan: Plan) -> list[tuple[int, ...]]:
    """The rows of this rank's micro batches, of those of a global batch."""
    world = distributed.world_size()
    own, size = share(chosen, distributed.rank(), world), plan.micro_batch(world)
    assert len(own) == size * plan.accumulation, "rows of unequal micro batches would not count alike"
    return [tuple(own[first : first + size]) for first in range(0, len(own), size)]


def builder(rows: LabelledExamples, pad_id: int, *, packed: bool) -> Callable[[tuple[int, ...], float], MicroBatch]:
    """Makes a micro batch of the rows with these numbers, with this `lm_scale`."""
    device = distributed.device()
    needs, weights = rows.multi_hot(rows.width), rows.weights()
    multiple = attention.width_multiple(device)
    longest = max((len(e.ids) for e in (*rows.examples, *rows.others)), default=0)

    def build(part: tuple[int, ...], scale: float) -> MicroBatch:
        examples = rows.at(part)
        batch = pack(examples, pad_id, multiple, longest) if packed else collate(examples, pad_id)
        experts = torch.tensor([rows.experts[i] for i in part], device=device)
        needed = needs[list(part)].to(device)
        weight = None if weights is None else weights[list(part)].to(device)
        numbers = part * (len(examples) // len(part))
        return MicroBatch(batch.to(device), experts, needed, scale, tuple(examples), numbers, gate_weights=weight)

    return build


def train(
    engine: Any,
    batches: Batches,
    step_loss: StepLoss,
    plan: Plan,
    progress: Progress,
    job: TrainingJob,
    largest: MicroBatch | None = None,
) -> Losses:
    """Make the optimizer steps of the plan, from where the job's newest checkpoint leaves off. Collective.

    `engine` is a DeepSpeed engine. `batches` yields this rank's micro batches, step by step. `step_loss` runs the
    forward pass of one micro batch. The `largest` one, if given, is tried before the first step: if memory does not
    suffice, that shows now and not in the middle of an epoch.

    Returns the loss of every step, averaged over micro batches and ranks; None for a step that was skipped because
    its loss or gradient was not finite. Raises Stopped, after a checkpoint, when a signal has asked for the end, and
    DataError when a step is not finite and may not be skipped.
    """
    engine.train()
    job.at_start(engine)
    if largest is not None:
        rehearse(engine, largest, step_loss)
    losses = job.checkpoints.restore(engine) if job.checkpoints else []
    progress.advance(by=len(losses))
    watch = Stopwatch(job.cost)
    for parts in watch.batches(batches(len(losses))):
        if job.evaluation and job.evaluation.is_over:
            break
        job.before_step(engine, parts)
        rate, outputs = engine.get_lr()[0], []
        with attention.planning_pays():
            for part in parts:
                output = step_loss(engine, part)
                engine.backward(_spread_nonfinite(output.loss))
                engine.step()
                outputs.append(replace(output, loss=output.loss.detach()))
        stop_asked, tokens = signals.stop_requested(), own_tokens(parts)
        metrics, stop = step_metrics(outputs, stop=stop_asked, tokens=tokens, waited=watch.waited)
        speed = watch.step(metrics)
        applied = engine.was_step_applied()
        losses.append(metrics.loss if applied else None)
        if not applied:
            job.nonfinite.handle(job.name, losses, _suspects(parts, outputs), partial(job.save, engine, losses[:-1]))
        norm = engine.get_global_grad_norm()
        optimizer = {"optimizer/lr": rate} | ({} if norm is None else {"optimizer/gradient_norm": float(norm)})
        evaluated = job.evaluation.after_step(engine, len(losses)) if job.evaluation else {}
        _log(job, len(losses), job.scalars(metrics) | optimizer | speed | evaluated)
        if job.checkpoints:
            job.checkpoints.after_step(engine, losses, now=stop or _is_best(job, len(losses)))
        if stop:
            raise Stopped(f"{job.name}, after step {len(losses)} of {plan.steps}")
        note = job.evaluation.note if job.evaluation else ""
        progress.summary = f"loss {metrics.loss:.3f}, {note}{watch.note()}"
        progress.advance(progress.summary)
    if job.evaluation:
        _conclude(engine, job, job.evaluation, losses, progress)
    return losses


def _is_best(job: TrainingJob, step: int) -> bool:
    """Whether the weights after this step may be the result, so that they have to be saved."""
    return bool(job.evaluation and job.evaluation.settings.keep_best and job.evaluation.best == step)


def _conclude(engine: Any, job: TrainingJob, evaluation: Evaluation, losses: Losses, progress: Progress) -> None:
    """Load the weights that are the result, and say what came of the evaluations."""
    facts = evaluation.facts(len(losses))
    if facts["stopped"]:
        progress.end_at(len(losses))
        why = f"{evaluation.settings.patience} evaluations in a row were no better than that after step {facts['best']}"
        console.say(f"{job.name}: ends after step {len(losses)} of {evaluation.steps}: {why}")
    if facts["kept"] != len(losses):
        assert job.checkpoints, "the best weights are kept in a checkpoint"
        job.checkpoints.load_best(engine, facts["kept"])
        console.say(f"{job.name}: the result has the weights after step {facts['kept']}, the best on the evaluation")


def _log(job: TrainingJob, step: int, values: dict[str, float]) -> None:
    """A curve holds finite values only."""
    job.log(step, {name: value for name, value in values.items() if math.isfinite(value)})


def _spread_nonfinite(loss: Tensor) -> Tensor:
    """NaN for a loss that is not finite: all its gradients become NaN, so DeepSpeed skips the step on every rank.

    The device decides. If the host did, it would wait for the forward pass before it launches the backward pass.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def _suspects(parts: list[MicroBatch], outputs: list[MicroBatchLoss]) -> list[MicroBatch]:
    """This rank's micro batches with a loss that is not finite; where no rank has one, all of them."""
    found = [p for p, output in zip(parts, outputs, strict=True) if not math.isfinite(float(output.loss))]
    return found if any(distributed.gather(bool(found))) else parts
