"""Jobs with and without the largest micro batch before their first step: their losses and trained weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed_jsons import JSONS
from problems import EXAMPLES, LABELS, PAD, SEED, align_config, fine_tune_config, mixture
from transformers.integrations import HfDeepSpeedConfig

from alignx_ds.data.batches import MicroBatch
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.runtime import distributed
from alignx_ds.runtime.console import Progress
from alignx_ds.stages import align, finetune
from alignx_ds.training import engine, loop, state
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.losses import language_loss

Trained = tuple[list[float | None], dict[str, torch.Tensor], dict[str, Any]]  # losses, state, facts
ROWS = LabelledExamples(EXAMPLES, LABELS)


def rehearsed(out: Path) -> dict[str, list[Trained]]:
    """By job: without and with the largest micro batch. Two micro batches make a step."""
    template = engine.read_template("ds_configs/stage1_zero3.json", "train.deepspeed")
    found = {}
    for zero, dtype in ((1, "float32"), (3, "bfloat16")):
        template["zero_optimization"] |= {"stage": zero, "stage3_param_persistence_threshold": 0}
        found[f"zero{zero} {dtype}"] = [_stage1(out, template, dtype, tried=tried) for tried in (False, True)]
    for name in ("ds_z2_offload", "ds_z3_offload"):
        found[name] = [_stage1(out, JSONS[name], "float32", tried=tried) for tried in (False, True)]
    found["stage 2"] = [_stage2(distributed.world_size(), tried=tried) for tried in (False, True)]
    return found


def _stage1(out: Path, template: dict[str, Any], dtype: str, *, tried: bool) -> Trained:
    config = fine_tune_config(out / "base", dtype=dtype)
    config.train.batch, config.train.accumulation = 2 * distributed.world_size(), 2
    base, plan = BaseModel(config.model), engine.Plan.of(config.train, dtype, config.train.steps)
    filled = engine.fill(template, plan, distributed.world_size(), base.config.hidden_size)
    zero3 = HfDeepSpeedConfig(filled)
    model = load_backbone(base)
    finetune.train_ffns_alone(model, base)
    made = engine.start(model, engine.decay_groups(list(model.named_parameters()), plan.weight_decay), filled, plan)
    trained = _trained(made, plan, language_loss, tried=tried)
    del zero3
    return trained


def _stage2(ep_size: int, *, tried: bool) -> Trained:
    config = align_config(ep_size, 2)
    plan = engine.Plan.of(config.align, "float32", config.align.steps)
    template = engine.read_template(config.align.deepspeed, "align.deepspeed")
    align.make_expert_groups(ep_size)
    model = mixture(placement=align.placement(ep_size))
    filled = engine.fill(template, plan, distributed.world_size())
    made = engine.start(model, align.parameter_groups(model, config), filled, plan)
    return _trained(made, plan, align.step_loss(config), tried=tried)


def _trained(made: Any, plan: engine.Plan, loss: loop.StepLoss, *, tried: bool) -> Trained:
    torch.manual_seed(SEED)
    largest: MicroBatch | None = loop.largest_micro_batch(ROWS, plan, PAD, SEED) if tried else None
    batches = partial(loop.micro_batches, ROWS, plan, PAD, SEED)
    losses = loop.train(made, batches, loss, plan, Progress(), TrainingJob("rehearsed"), largest)
    tensors = {name: tensor.clone() for name, tensor in state.gather(made)}
    facts = state.facts(made) | {"random": torch.rand(()).item()}
    engine.end(made)
    return losses, tensors, facts
