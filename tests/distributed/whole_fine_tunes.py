"""Fine-tunes of all weights: one, one that goes on from it without learning, and one stopped after two steps and given
again.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from problems import fine_tune_context, stopped_after_two_steps

from alignx_ds.config.schema import CheckpointsConfig
from alignx_ds.errors import Stopped
from alignx_ds.experts.task_vectors import add_task_vector
from alignx_ds.models.backbone import load_backbone
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed
from alignx_ds.stages import finetune
from alignx_ds.stages.stage import StageContext

TUNE = finetune.FineTune("a", ("a",), is_expert=True)
STILL = finetune.FineTune("still", ("b",), start="a")


def whole(out: Path) -> dict[str, Any]:
    """Their manifests, and the weights that a comparison gets of the first two."""
    broken = _context(out, "whole_stopped")
    context, found = _context(out, "whole"), {}
    made = {"a": finetune.fine_tune(context, TUNE)}
    context.config.train.lr = 1e-12
    made["still"] = finetune.fine_tune(context, STILL)
    with stopped_after_two_steps(), suppress(Stopped):
        finetune.fine_tune(broken, TUNE)
    made["resumed"] = finetune.fine_tune(broken, TUNE)
    for name in ("a", "still"):
        model = load_backbone(context.base)
        add_task_vector(model, context.base, made[name])
        found[f"{name}'s weights"] = {n: p.detach() for n, p in model.named_parameters()}
    return {**found, **{name: manifest.read(directory) for name, directory in made.items()}}


def _context(out: Path, name: str) -> StageContext:
    context = fine_tune_context(out, f"{name}{distributed.world_size()}")
    context.config.train.trainable = "all"
    context.config.checkpoints = CheckpointsConfig(every=3)
    return context
