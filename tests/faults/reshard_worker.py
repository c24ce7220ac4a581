"""One rank of `reshard_worker.py ROOT KIND HOW SOURCE TARGET STEPS EVERY`.

Resumes SOURCE's newest checkpoint ("-": none) and trains up to STEPS steps, with a checkpoint in TARGET after each
EVERY steps. Reports whether what was loaded equals what was saved, tensor by tensor.

KIND is stage1, "stage1, LoRA", stage2 or "stage2, untrained experts"; HOW is the ZeRO stage, and for stage 2 the
ep_size: "3", "2 ep4".
"""

from __future__ import annotations

import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("distributed", "")]  # what tests share


def stage1(root: Path, zero: int, lora: bool) -> tuple[Any, Any, Any, Any]:
    from problems import fine_tune_config
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from alignx_ds.experts.lora import Lora, add_lora
    from alignx_ds.mocae.experts import PROJECTIONS
    from alignx_ds.models.base import BaseModel
    from alignx_ds.runtime import distributed
    from alignx_ds.training import engine
    from alignx_ds.training.losses import language_loss

    config = fine_tune_config(root / "base")
    base = BaseModel(config.model)
    plan = engine.Plan.of(config.train, "float32", 6)
    template = engine.read_template(config.train.deepspeed, "train.deepspeed")
    template["zero_optimization"]["stage"] = zero
    template["zero_optimization"]["stage3_param_persistence_threshold"] = 70  # some whole on every rank, most padded
    filled = engine.fill(template, plan, distributed.world_size())
    zero3 = HfDeepSpeedConfig(filled)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    trained = {base.table.weight_name(layer, p) for layer in base.layers for p in PROJECTIONS}
    if lora:
        add_lora(model, base.table, base.layers, Lora.of(config), config.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name if lora else name in trained or "norm" in name)
    groups = engine.decay_groups(list(model.named_parameters()), plan.weight_decay)
    return engine.start(model, groups, filled, plan), plan, language_loss, zero3


def stage2(kind: str, zero: int, ep_size: int) -> tuple[Any, Any, Any, Any]:
    from problems import align_config, mixture

    from alignx_ds.runtime import distributed
    from alignx_ds.stages import align
    from alignx_ds.training import engine

    frozen = "untrained" in kind
    config = align_config(ep_size, 1, 0.0 if frozen else 0.5)
    model = mixture(placement=align.placement(ep_size), frozen=frozen)
    plan = engine.Plan.of(config.align, "float32", 6)
    template = engine.read_template(config.align.deepspeed, "align.deepspeed")
    template["zero_optimization"]["stage"] = zero
    align.make_expert_groups(ep_size)
    filled = engine.fill(template, plan, distributed.world_size())
    return (
        engine.start(model, align.parameter_groups(model, config), filled, plan),
        plan,
        align.step_loss(config),
        None,
    )


def main(root: Path, kind: str, how: str, source: str, target: str, steps: int, every: int) -> None:
    from problems import EXAMPLES, LABELS, PAD, SEED

    from alignx_ds.config.schema import CheckpointsConfig
    from alignx_ds.data.encode import LabelledExamples
    from alignx_ds.runtime import distributed
    from alignx_ds.runtime.console import Progress
    from alignx_ds.training import checkpoints, loop, state
    from alignx_ds.training.job import TrainingJob
    from alignx_ds.training.manager import CheckpointManager

    zero, _, ep = how.partition(" ep")
    if kind.startswith("stage1"):
        made, plan, loss, _alive = stage1(root, int(zero), "LoRA" in kind)
    else:
        made, plan, loss, _alive = stage2(kind, int(zero), int(ep))
    inputs, same = {"kind": kind}, True
    losses: list[float | None] = []
    if source != "-":
        found = checkpoints.newest(root / source, inputs)
        assert found is not None
        checkpoints.load(found, made, SEED)
        losses = found.losses
        saved = {}
        for file in found.path.glob("rank*.safetensors"):
            saved |= load_file(file)
        same = all(torch.equal(tensor, saved[name]) for name, tensor in state.gather(made))

    class Resumed(CheckpointManager):
        def restore(self, engine: Any) -> list[float | None]:
            return losses

    resumed = Resumed(target, inputs, root, CheckpointsConfig(every=every, keep=9), SEED)
    batches = partial(loop.micro_batches, LabelledExamples(EXAMPLES, LABELS), plan, PAD, SEED)

    def until(start: int) -> Any:
        for number, step in enumerate(batches(start), start=start):
            if number == steps:
                return
            yield step

    losses = loop.train(made, until, loss, plan, Progress(), TrainingJob(target, resumed))
    all_same = all(distributed.gather(same))
    if distributed.is_main():
        (root / f"{target}.json").write_text(json.dumps({"losses": losses, "same": all_same}))
    made.destroy()
    distributed.barrier()


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gc.disable()  # imports make no garbage, and the search for it takes a second
    from alignx_ds.config.schema import LaunchConfig
    from alignx_ds.runtime import distributed

    distributed.init_process_group(LaunchConfig.timeout)
    main(Path(sys.argv[1]), *sys.argv[2:6], *map(int, sys.argv[6:]))
    distributed.shutdown()
    distributed.exit_rank(0)
