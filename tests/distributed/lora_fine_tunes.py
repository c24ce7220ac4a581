"""LoRA fine-tunes: one after another; and one with dropout, whole, and stopped after two steps and given again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from problems import fine_tune_context, stopped_after_two_steps

from alignx_ds.config.schema import CheckpointsConfig
from alignx_ds.errors import Stopped
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed
from alignx_ds.stages import finetune
from alignx_ds.stages.stage import StageContext


def lora(out: Path) -> dict[str, Any]:
    """The manifests of the two with dropout; what all leave on disk is read by the tests."""
    plain, whole, broken = (_context(out, name, dropout) for name, dropout in CONTEXTS.items())
    plain.config.checkpoints.finished = True
    finetune.fine_tune(plain, TUNE)
    finetune.fine_tune(plain, finetune.FineTune("then_b", ("b",), start="a"))
    made = finetune.fine_tune(whole, TUNE)
    with stopped_after_two_steps(), suppress(Stopped):
        finetune.fine_tune(broken, TUNE)
    return {"whole": manifest.read(made), "resumed": manifest.read(finetune.fine_tune(broken, TUNE))}


CONTEXTS = {"lora": 0.0, "lora_whole": 0.25, "lora_stopped": 0.25}  # with their dropout
TUNE = finetune.FineTune("a", ("a",), is_expert=True)


def _context(out: Path, name: str, dropout: float) -> StageContext:
    context = fine_tune_context(out, f"{name}{distributed.world_size()}")
    context.config.train.trainable, context.config.train.lora.dropout = "lora", dropout
    context.config.checkpoints = CheckpointsConfig(every=3)
    return context
