"""Optimizer steps of both stages on a GPU, with torch's and DeepSpeed's optimizers, and with states on the CPU."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import (
    ALIGNX_LAYERS,
    TABLE,
    VOCABULARY,
    aligned,
    base_model,
    generator,
    low_rank_experts,
    random_changes,
    specialist,
)
from transformers.integrations import HfDeepSpeedConfig

from alignx_ds.baselines.fusion import FullExperts, replace_ffns
from alignx_ds.config.schema import AlignConfig, FusionConfig, RunConfig, SpecialistConfig
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.mocae.experts import FeedForward
from alignx_ds.mocae.layer import freeze_trunk
from alignx_ds.mocae.modeling import Placement
from alignx_ds.models.base import dtype_of
from alignx_ds.runtime.console import Progress
from alignx_ds.stages import align, fuse
from alignx_ds.training import engine
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.loop import micro_batches, train
from alignx_ds.training.losses import language_loss

STEPS, BATCH = 4, 4
SOURCE = generator(3)
EXAMPLES = [Example(tuple(torch.randint(1, VOCABULARY, (6 + i % 7,), generator=SOURCE).tolist()), 3) for i in range(16)]
OPTIMIZERS = {  # changes to stage 1's JSON
    "torch's": {},
    "FusedAdam": {"torch_adam": False},
    "states on the CPU": {"offload": True},
    "CPUAdam": {"torch_adam": False, "offload": True},
}


def template(which: str) -> dict[str, Any]:
    made, changes = engine.read_template(SpecialistConfig().deepspeed, "train.deepspeed"), OPTIMIZERS[which]
    if not changes.get("torch_adam", True):
        made["optimizer"]["params"]["torch_adam"] = False
        del made["optimizer"]["params"]["fused"]  # an argument of torch's
    if changes.get("offload"):
        made["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return made


def stage1(which: str, dtype: str, device: str) -> tuple[list[float | None], dict[str, torch.Tensor]]:
    plan = engine.Plan.of(SpecialistConfig(batch=BATCH, lr=0.01, warmup_steps=0), dtype, STEPS)
    filled = engine.fill(template(which), plan, 1)
    sharded = HfDeepSpeedConfig(filled)
    model = base_model().to(device, dtype_of(dtype))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    made = engine.start(model, engine.decay_groups(list(model.named_parameters()), 0.0), filled, plan)
    batches = partial(micro_batches, LabelledExamples(EXAMPLES, [0] * len(EXAMPLES)), plan, 0, 0, packed=True)
    losses = train(made, batches, language_loss, plan, Progress(), TrainingJob("stage1"))
    state = {n: t.float().cpu() for n, t in made._zero3_consolidated_16bit_state_dict().items()}
    engine.end(made)
    del sharded
    return losses, state


@pytest.mark.timeout(600)  # DeepSpeed's optimizers are compiled at first use
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", [name for name in OPTIMIZERS if name != "torch's"])
def test_every_optimizer_of_deepspeed_makes_the_steps_of_torch_s(
    device: str, group: None, which: str, dtype: str
) -> None:
    if device == "cpu" and which != "states on the CPU":
        pytest.skip("compiling it takes minutes")
    expected, weights = stage1("torch's", dtype, device)
    found, state = stage1(which, dtype, device)
    assert all(loss is not None and math.isfinite(loss) for loss in found)
    assert found == pytest.approx(expected, rel=1e-4 if dtype == "float32" else 2e-2)
    assert expected[-1] != expected[0]
    for name, weight in weights.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-3 if dtype == "float32" else 1e-2, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["torch's", "FusedAdam"])
def test_stage_2_trains_on_the_expert_parallel_path(device: str, group: None, optimizer: str, dtype: str) -> None:
    if device == "cpu" and optimizer == "FusedAdam":
        pytest.skip("compiling it takes minutes")
    config = RunConfig(align=AlignConfig(ep_size=1, batch=BATCH, steps=STEPS, lr=0.01, warmup_steps=0))
    base = base_model()
    model = aligned(base, low_rank_experts(base), placement=Placement(1, 0)).to(device)
    model.backbone.to(dtype_of(dtype))
    freeze_trunk(model)
    plan = engine.Plan.of(config.align, dtype, STEPS)
    made_of = engine.read_template(config.align.deepspeed, "align.deepspeed")
    if optimizer == "FusedAdam":
        made_of["optimizer"]["params"]["torch_adam"] = False
        del made_of["optimizer"]["params"]["fused"]
    align.make_expert_groups(1)
    made = engine.start(model, align.parameter_groups(model, config), engine.fill(made_of, plan, 1), plan)
    rows = LabelledExamples(EXAMPLES, [i % 4 for i in range(len(EXAMPLES))])
    losses = train(
        made, partial(micro_batches, rows, plan, 0, 0), align.step_loss(config), plan, Progress(), TrainingJob("stage2")
    )
    engine.end(made)
    assert all(loss is not None and math.isfinite(loss) for loss in losses) and len(losses) == STEPS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", fuse.SETTINGS)
@pytest.mark.parametrize("lr_scale", [1.0, 0.0])
def test_the_fusions_train(device: str, group: None, name: str, dtype: str, lr_scale: float) -> None:
    """With experts that learn and with frozen ones; the loss falls on rows that come again and again."""
    settings = FusionConfig(
        batch=BATCH, lr=0.02, warmup_steps=0, steps=12, expert_lr_scale=lr_scale, drift=0.1, entropy=0.1, uniform=0.05
    )
    model, changes = base_model(), random_changes(base_model())
    specialists = [specialist(model, changes, n) for n in (1, 2, 3)]

    def make(layer: int, ffn: FeedForward) -> FullExperts:
        return FullExperts([TABLE.view(TABLE.ffn_of(s, layer)) for s in specialists], fuse.SETTINGS[name])

    replace_ffns(model, TABLE, ALIGNX_LAYERS, make)
    model.to(device, dtype_of(dtype))
    fuse.freeze_trunk(model, settings)
    plan = engine.Plan.of(settings, dtype, settings.steps)
    filled = engine.fill(engine.read_template(settings.deepspeed, "deepspeed"), plan, 1)
    loss = fuse.step_loss(model, settings, ["a", "b", "c"])
    made = engine.start(model, fuse.parameter_groups(model, settings), filled, plan)
    rows = LabelledExamples(EXAMPLES[:BATCH], [i % 4 for i in range(BATCH)])
    losses = train(made, partial(micro_batches, rows, plan, 0, 0), loss, plan, Progress(), TrainingJob(name))
    engine.end(made)
    found = [value for value in losses if value is not None]
    assert all(map(math.isfinite, found)) and len(found) == settings.steps
    assert found[-1] < found[0]
