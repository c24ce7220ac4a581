"""Fine-tunes on objectives other than imitation: whole, and stopped after two of their three steps and given again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from problems import EXAMPLES, fine_tune_context, stopped_after_two_steps

from alignx_ds.config.schema import PAIRED
from alignx_ds.data.compared import ComparedRows
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.errors import Stopped
from alignx_ds.experts.task_vectors import read_task_vector
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed
from alignx_ds.stages import finetune
from alignx_ds.stages.stage import StageContext
from alignx_ds.training.metrics import ScalarLogger

OBJECTIVES = {"dpo": "stage1_zero3", "kto": "fusion_zero2", "bco": "stage1_zero3"}  # the DeepSpeed JSON of each
GOOD = [True, False, True, True, False, True, False, True]
ALONE = [not good for good in GOOD]  # of the pairs


def objectives(out: Path) -> dict[str, Any]:
    """By objective: losses, curves and task vector of the first layer, and the losses after an interruption.

    Every world size makes micro batches of two rows.
    """
    return {name: _trained(out, name) for name in OBJECTIVES}


def _trained(out: Path, name: str) -> dict[str, Any]:
    curves: list[dict[str, float]] = []
    made = finetune.fine_tune(_context(out, name, "whole", curves), finetune.FineTune("a", ("a",)))
    context = _context(out, name, "interrupted", [])
    with stopped_after_two_steps(), suppress(Stopped):
        finetune.fine_tune(context, finetune.FineTune("a", ("a",)))
    resumed = finetune.fine_tune(context, finetune.FineTune("a", ("a",)))
    return {
        "losses": manifest.read(made)["losses"],
        "curves": curves,
        "vector": read_task_vector(made, context.base.layers[0]),
        "resumed": manifest.read(resumed)["losses"],
        "same files": manifest.read(made)["files"] == manifest.read(resumed)["files"],
    }


def _context(out: Path, name: str, kind: str, curves: list[dict[str, float]]) -> StageContext:
    context = fine_tune_context(out, f"{name} {kind} {distributed.world_size()}")
    config = context.config
    config.axes["a"].objective, config.axes["a"].sft_weight, config.axes["a"].beta = name, 0.2, 0.5
    config.train.deepspeed = f"ds_configs/{OBJECTIVES[name]}.json"
    config.train.accumulation = 2 // distributed.world_size()

    def logger(directory: Path) -> ScalarLogger:
        return lambda step, values: curves.append(values)

    return replace(context, data=replace(context.data, compared={"a": compared_rows(name)}), logger=logger)


def compared_rows(name: str) -> ComparedRows:
    """The bad answers, and the mismatched ones, are the good ones backwards."""
    turned = [
        Example((*e.ids[: e.prompt_length], *e.ids[: e.prompt_length - 1 : -1]), e.prompt_length) for e in EXAMPLES
    ]
    numbers = [0] * len(EXAMPLES)
    if name in PAIRED:
        return ComparedRows(LabelledExamples(EXAMPLES, numbers, others=turned), alone=ALONE)
    weights = [1.0 if good else 0.5 + 0.25 * n for n, good in enumerate(GOOD)]
    return ComparedRows(LabelledExamples(EXAMPLES, numbers), GOOD, turned if name == "kto" else [], weights)
