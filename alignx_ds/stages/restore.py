"""The baseline `restored`: the sequential fine-tune, with what it has lost set back to the specialists' weights.

In every round the axis that has lost most is restored by the rule of baselines/restoration.py. What an axis has lost is
the NLL of its calibration rows, less its specialist's. The result is the round with the lowest mean over the axes.

The published rule restores one goal, with a loss on hidden states, and undoes a part of it where the task suffers. The
choice among axes, NLL as the loss, a share of each weight matrix instead of the whole model, and the end by the
calibration split are ours. The last axis is restored like any other, when it has become the one that has lost most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alignx_ds.baselines.restoration import restorable
from alignx_ds.config.schema import RESTORED
from alignx_ds.data.batches import MicroBatch
from alignx_ds.data.encode import Example, LabelledExamples, pad_token
from alignx_ds.experts.task_vectors import Changes, layer_file, projections, read_task_vector
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed, signals
from alignx_ds.stages.finetune import train_ffns_alone
from alignx_ds.stages.stage import Stage, StageContext, ensure
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.loop import builder
from alignx_ds.training.losses import language_loss
from alignx_ds.training.metrics import summed

ROUNDS, ROWS = 20, 256  # as published
SHARE = 0.01  # of a weight matrix, restored in a round
CALIBRATION_ROWS = 64  # of each axis, at most
MICRO_BATCH = 16  # rows of a forward pass


def restored(context: StageContext, sequential: Path, specialists: dict[str, Path]) -> dict[str, Path]:
    """The baseline's directory by its name, if the recipe lists it. Collective."""
    if RESTORED not in context.config.baselines.make:
        return {}
    marks = [manifest.read(directory)["fingerprint"] for directory in (sequential, *specialists.values())]
    stage = stage_of(context, marks[0], marks[1:])
    return {RESTORED: ensure(stage, context, partial(_make, context, sequential, specialists))}


def stage_of(context: StageContext, sequential: str, specialists: list[str]) -> Stage:
    """Its stage; the arguments are fingerprints, which cover the base, its layers and the axes' rows."""
    inputs = {
        "start": sequential,
        "specialists": specialists,
        "rows": context.data.digests["calibration_rows"],
        "stage": [ROUNDS, ROWS, SHARE, CALIBRATION_ROWS],
    }
    return Stage(RESTORED, f"baselines/{RESTORED}", context.out.baselines / RESTORED, inputs)


@dataclass(frozen=True)
class Round:
    """The axis that was restored, none before the first round, and every axis's NLL after it."""

    restored: str
    losses: dict[str, float]


@dataclass
class _Model:
    """The base model with a change of its FFNs, on this rank's device; all ranks hold the same."""

    model: nn.Module
    base: BaseModel
    pad_id: int

    @torch.no_grad()
    def change(self, layer: int, changes: Changes) -> None:
        for p, weight in projections(self.model, self.base.table, layer).items():
            weight.copy_(self.base.weight(layer, p) + changes[p])

    def batches(self, examples: list[Example]) -> Iterator[MicroBatch]:
        """This rank's."""
        own = distributed.rank_share(examples)
        build = builder(LabelledExamples(own, [0] * len(own)), self.pad_id, packed=True)
        for first in range(0, len(own), MICRO_BATCH):
            yield build(tuple(range(first, min(first + MICRO_BATCH, len(own)))), 1.0)

    @torch.no_grad()
    def nll(self, examples: list[Example]) -> float:
        """Mean NLL per answer token, in nats. Collective."""
        losses = [language_loss(self.model, part).loss for part in self.batches(examples)]
        (total,) = summed([sum(losses, torch.zeros((), device=distributed.device()))])
        return float(total) / sum(e.learned_length for e in examples)

    def gradients(self, examples: list[Example]) -> dict[tuple[int, str], Tensor]:
        """By layer and projection, the gradient of the summed NLL, fp32 on the CPU. Collective."""
        self.model.zero_grad()
        for part in self.batches(examples):
            torch.autograd.backward(language_loss(self.model, part).loss)
        found = {}
        for layer in self.base.layers:
            for p, weight in projections(self.model, self.base.table, layer).items():
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                if distributed.world_size() > 1:
                    torch.distributed.all_reduce(gradient)
                found[layer, p] = gradient.float().cpu()
        return found


def _make(context: StageContext, sequential: Path, specialists: dict[str, Path], job: TrainingJob) -> dict[str, Any]:
    base, rows = context.base, _calibration_rows(context)
    model = load_backbone(base)
    train_ffns_alone(model, base)
    held = _Model(model.to(distributed.device()), base, pad_token(base.tokenizer))
    reached = {axis: _loaded(held, directory).nll(rows[axis]) for axis, directory in specialists.items()}
    changes = {layer: read_task_vector(sequential, layer) for layer in base.layers}
    losses = {axis: _loaded(held, sequential).nll(rows[axis]) for axis in specialists}
    best, chosen, rounds = changes, 0, [Round("", losses)]
    with console.progress("restore", ROUNDS) as bar:
        for _ in range(ROUNDS):
            signals.stop_if_requested(RESTORED)
            axis = max(losses, key=lambda name: losses[name] - reached[name])
            gradients = held.gradients(context.data.injected[axis][:ROWS])
            changes = {layer: _restore(specialists[axis], layer, changes[layer], gradients) for layer in changes}
            for layer, change in changes.items():
                held.change(layer, change)
            losses = {name: held.nll(rows[name]) for name in specialists}
            if mean(losses.values()) < min(mean(seen.losses.values()) for seen in rounds):
                best, chosen = changes, len(rounds)
            rounds.append(Round(axis, losses))
            bar.advance(axis)
    console.say(f"{RESTORED}: the weights after round {chosen} of {ROUNDS}, the best on the calibration split")
    distributed.on_main(partial(_save, context.out.baselines / RESTORED, best))
    return {"reached": reached, "rounds": [asdict(seen) for seen in rounds], "chosen": chosen}


def _loaded(held: _Model, directory: Path) -> _Model:
    for layer in held.base.layers:
        held.change(layer, read_task_vector(directory, layer))
    return held


def _restore(specialist: Path, layer: int, change: Changes, gradients: dict[tuple[int, str], Tensor]) -> Changes:
    """The layer's change, with the specialist's values where the rule says so."""
    aligned, found = read_task_vector(specialist, layer), {}
    for p in PROJECTIONS:
        lost = restorable(change[p] - aligned[p], gradients[layer, p], SHARE)
        found[p] = torch.where(lost, aligned[p], change[p])
    return found


def _save(directory: Path, changes: dict[int, Changes]) -> None:
    for layer, change in changes.items():
        save_file({f"task_vector.{p}": change[p].contiguous() for p in PROJECTIONS}, layer_file(directory, layer))


def _calibration_rows(context: StageContext) -> dict[str, list[Example]]:
    """By axis, the first rows of its calibration split that have an answer."""
    split, found = context.data.calibration_rows, {}
    for expert, axis in enumerate(context.config.axes, start=1):
        own = (e for e, owner in zip(split.examples, split.experts, strict=True) if owner == expert)
        found[axis] = [e for e in own if e.answer_length][:CALIBRATION_ROWS]
    return found
