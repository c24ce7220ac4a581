"""Fine-tunes that are evaluated while they train: what it costs training, early ends, resumption, every objective."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from objectives import compared_rows
from problems import EXAMPLES, fine_tune_context
from tiny_models import random_rows

from alignx_ds.config.monitoring import EvaluateConfig
from alignx_ds.config.schema import CheckpointsConfig
from alignx_ds.data.encode import Example
from alignx_ds.errors import Stopped
from alignx_ds.experts.task_vectors import read_task_vector
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed, signals
from alignx_ds.stages import finetune
from alignx_ds.stages.stage import StageContext

WORLD = distributed.world_size()
OTHERS = [Example(tuple(r), 3) for r in random_rows([8, 6, 11, 5, 7], 77)]  # not a multiple of any batch
OBJECTIVES = {  # by world size; several ranks differ in what they share: counts of tokens or pairs, shifts
    1: ("sft", "dpo", "orpo", "simpo", "poft", "kto", "bco"),
    2: ("sft", "dpo", "kto", "bco"),
}
TUNE = finetune.FineTune("a", ("a",))


def context_of(out: Path, name: str, rows: list[Example] = OTHERS, **evaluate: Any) -> StageContext:
    context = fine_tune_context(out, f"evaluated {name}")
    context.config.train.evaluate = EvaluateConfig(**evaluate)
    return replace(context, data=replace(context.data, evaluated={"a": rows, "b": rows}))


def evaluated(out: Path) -> dict[str, Any]:
    return {
        "undisturbed": {name: _undisturbed(out, name) for name in ("ffn", "lora")},
        "stopped": stopped(out, f"stopped {WORLD}"),
        "resumed": _resumed(out),
        "objectives": {name: _objective(out, name) for name in OBJECTIVES[WORLD]},
    }


def _undisturbed(out: Path, trainable: str) -> list[dict[str, Any]]:
    """Manifests without and with evaluations. LoRA has a dropout, whose random numbers nothing else may draw."""
    made = []
    for every in (0, 1):
        context = context_of(out, f"{trainable} {every} {WORLD}", every=every, keep_best=False)
        context.config.train.trainable, context.config.train.lora.dropout = trainable, 0.25
        made.append(manifest.read(finetune.fine_tune(context, replace(TUNE, is_expert=True))))
    return made


def rising(out: Path, name: str) -> StageContext:
    """A fine-tune that soon learns its eight rows by heart."""
    context = context_of(out, name, every=2, patience=2)
    context.config.train = replace(context.config.train, lr=0.02, steps=40, warmup_steps=0)
    context.config.checkpoints = CheckpointsConfig(every=5, keep=1, finished=True)
    return context


def stopped(out: Path, name: str) -> dict[str, Any]:
    context = rising(out, name)
    made = finetune.fine_tune(context, TUNE)
    kept = sorted(path.name for path in context.out.checkpoints.glob("*/*/step_*"))
    vectors = {layer: read_task_vector(made, layer) for layer in context.base.layers}
    return {"manifest": manifest.read(made), "checkpoints": kept, "vectors": vectors}


def interrupt(context: StageContext, step: int) -> None:
    """Start the fine-tune, and stop it after this step."""
    calls = iter([*[False] * (step - 1), True])
    signals.stop_requested, asked = lambda: next(calls), signals.stop_requested
    with suppress(Stopped):
        finetune.fine_tune(context, TUNE)
    signals.stop_requested = asked


def _resumed(out: Path) -> dict[int, dict[str, Any]]:
    """By the step after which the run was stopped: before the best step, and between it and the end."""
    found = {}
    for step in (1, 7):
        context = rising(out, f"interrupted {step} {WORLD}")
        interrupt(context, step)
        found[step] = manifest.read(finetune.fine_tune(context, TUNE))
    interrupt(rising(out, f"left by {WORLD}"), 7)
    return found


def moved(out: Path) -> dict[str, Any]:
    """What one rank has left unfinished, finished by these."""
    if distributed.is_main():
        shutil.copytree(out / "evaluated left by 1", out / "evaluated moved", dirs_exist_ok=True)
    distributed.barrier()
    return stopped(out, "moved")


def _objective(out: Path, name: str) -> dict[str, Any]:
    """Every step has all rows, which are also those that are evaluated."""
    context = context_of(out, f"{name} {WORLD}", EXAMPLES, every=1)
    axis, train = context.config.axes["a"], context.config.train
    axis.objective, axis.sft_weight, axis.beta = name, 0.2, 0.5
    train.batch, train.accumulation = 8, 2 // WORLD
    if name not in ("sft", "poft"):
        both = {"a": compared_rows(name)}
        context = replace(context, data=replace(context.data, compared=both, evaluated_compared=both))
    return dict(manifest.read(finetune.fine_tune(context, TUNE)))
