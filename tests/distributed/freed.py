"""What is left in memory of an engine and its model once a training job has ended."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import torch
from problems import (
    CALIBRATION_ROWS,
    EXPERTS,
    STAGE_ROWS,
    fine_tune_context,
    fusion_context,
    whole_stage_config,
)
from stage_contexts import stage_context
from tiny_models import base_model, low_rank_experts

from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import distributed
from alignx_ds.stages import align, finetune, fuse
from alignx_ds.training import engine
from alignx_ds.training.job import TrainingJob

WORLD = distributed.world_size()


def freed(out: Path) -> dict[str, list[str]]:
    """By training job, what of its engine is still in memory afterwards: engine, module, optimizer and all tensors."""
    watched: list[dict[str, weakref.ref[Any]]] = []

    def end(made: Any) -> None:
        watched.append(parts_of(made))
        end_of(made)

    end_of, engine.end = engine.end, end
    context = fine_tune_context(out, f"freed{WORLD}")
    config = context.config
    config.model.dtype = "bfloat16"
    template = engine.read_template(config.train.deepspeed, "train.deepspeed")
    config.train.deepspeed = str(out / f"freed{WORLD}.json")
    found = {}
    for zero in (1, 2, 3):
        template["zero_optimization"]["stage"] = zero
        distributed.on_main(lambda: Path(config.train.deepspeed).write_text(json.dumps(template)))
        finetune.fine_tune(context, finetune.FineTune("a" if zero == 3 else f"zero{zero}", ("a",), is_expert=zero == 3))
        found[f"zero{zero}"] = left_of(watched.pop())
    specialists = [out / f"specialist{n}" for n in range(EXPERTS - 1)]
    for name in fuse.SETTINGS:
        fuse.train_fusion(fusion_context(out, f"freed{WORLD}", 1), name, specialists)
        found[name] = left_of(watched.pop())
    for name, how in (("stage2", f"ep{WORLD}"), ("stage2, ZeRO-3", "ep0 zero3")):
        config = whole_stage_config(out / "base", how)
        context = stage_context(config, Outputs(out / "freed_stage", out), STAGE_ROWS, CALIBRATION_ROWS)
        align.train_mixture(context, low_rank_experts(base_model()), TrainingJob("stage2"))
        found[name] = left_of(watched.pop())
    engine.end = end_of
    assert not watched
    return found


def parts_of(made: Any) -> dict[str, weakref.ref[Any]]:
    """The engine, its module, its optimizer, and their tensors: weights, gradients, masters, optimizer states."""
    parts = {"engine": made, "module": made.module, "optimizer": made.optimizer}
    for name, parameter in made.module.named_parameters():
        parts |= {name: parameter, f"{name}, shard": getattr(parameter, "ds_tensor", parameter)}
    for number, (master, state) in enumerate(made.optimizer.optimizer.state.items()):
        parts |= {f"master {number}": master} | {f"{key} {number}": t for key, t in state.items() if torch.is_tensor(t)}
    return {name: weakref.ref(part) for name, part in parts.items()}


def left_of(parts: dict[str, weakref.ref[Any]]) -> list[str]:
    assert any(name.startswith("master") for name in parts)
    return [name for name, part in parts.items() if part() is not None]
