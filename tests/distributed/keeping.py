"""Fine-tunes that keep what an earlier one has learned: whole, and stopped after two of three steps and given again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from problems import (
    EXAMPLES,
    PAD,
    ffn_weights,
    fine_tune_context,
    fine_tune_in_plain_torch,
    stopped_after_two_steps,
)
from tiny_models import base_model
from torch import Tensor, nn
from whole_logits import answer_nll

from alignx_ds.config.schema import KeepConfig
from alignx_ds.data.batches import collate
from alignx_ds.errors import Stopped
from alignx_ds.experts.task_vectors import read_task_vector
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed
from alignx_ds.stages import finetune
from alignx_ds.stages.stage import StageContext
from alignx_ds.training.metrics import ScalarLogger

KEEP = KeepConfig(fisher=0.5, collision=200.0, rows=3)  # strong enough to be seen in three steps
ZERO = {3: "stage1_zero3", 2: "fusion_zero2", 1: "scratch_zero1"}  # the DeepSpeed JSON of each
STAGES = {1: (3,), 2: tuple(ZERO)}  # by world size: one rank holds all gradients whatever the stage
FIRST = finetune.FineTune("a", ("a",), is_expert=True)
PLAIN = finetune.FineTune("plain", ("a",), start="a")
KEPT = replace(PLAIN, name="kept", before=(FIRST,), keep=KEEP)


def keeping(out: Path) -> dict[int, dict[str, Any]]:
    """By ZeRO stage. Every world size makes micro batches of two rows."""
    return {stage: _trained(out, stage) for stage in STAGES[distributed.world_size()]}


def _trained(out: Path, stage: int) -> dict[str, Any]:
    curves: list[dict[str, float]] = []
    context = _context(out, f"keeping{stage}", stage)
    finetune.fine_tune(context, FIRST)
    plain = finetune.fine_tune(context, PLAIN)
    kept = finetune.fine_tune(replace(context, logger=lambda directory: _logger(curves)), KEPT)
    with stopped_after_two_steps(), suppress(Stopped):
        finetune.fine_tune(context, replace(KEPT, name="stopped"))
    resumed = finetune.fine_tune(context, replace(KEPT, name="stopped"))
    places = {"first": context.out.specialists / "a", "plain": plain, "kept": kept}
    return {
        "vectors": {n: [read_task_vector(d, layer) for layer in context.base.layers] for n, d in places.items()},
        "losses": manifest.read(kept)["losses"],
        "curves": curves,
        "same files": manifest.read(kept)["files"] == manifest.read(resumed)["files"],
    }


def _logger(curves: list[dict[str, float]]) -> ScalarLogger:
    return lambda step, values: curves.append(values)


def _context(out: Path, name: str, stage: int) -> StageContext:
    context = fine_tune_context(out, f"{name} {distributed.world_size()}")
    context.config.train.deepspeed = f"ds_configs/{ZERO[stage]}.json"
    context.config.train.accumulation = 2 // distributed.world_size()
    return context


def kept_in_plain_torch() -> dict[str, Any]:
    """What KEPT must give, with torch's own gradients of the loss and both terms. The start is learned here too."""
    first = fine_tune_in_plain_torch()
    directions = [v[p] / v[p].norm() for v in first["vectors"].values() for p in v]
    model = base_model()
    with torch.no_grad():
        for weight, change in zip(
            ffn_weights(model), (v[p] for v in first["vectors"].values() for p in v), strict=True
        ):
            weight += change
    start = [weight.detach().clone() for weight in ffn_weights(model)]
    fisher = _fisher(model)

    def penalty(weights: list[nn.Parameter]) -> Tensor:
        moved = [w - s for w, s in zip(weights, start, strict=True)]
        near = sum(((f * m.square()).sum() for f, m in zip(fisher, moved, strict=True)), torch.zeros(()))
        apart = sum(((d * m).sum().square() for d, m in zip(directions, moved, strict=True)), torch.zeros(()))
        return (KEEP.fisher * near + KEEP.collision * apart) / 2

    return fine_tune_in_plain_torch(model, penalty)


def _fisher(model: nn.Module) -> list[Tensor]:
    weights = ffn_weights(model)
    found = [torch.zeros_like(w) for w in weights]
    for example in EXAMPLES[: KEEP.rows]:
        row = collate([example], PAD)
        nll = answer_nll(model(input_ids=row.input_ids).logits, row.labels)
        for f, gradient in zip(found, torch.autograd.grad(nll, weights), strict=True):
            f += gradient.square()
    mean = torch.cat([f.flatten() for f in found]).mean()
    return [f / mean for f in found]
