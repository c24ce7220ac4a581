"""Problems of the training stages: steps, batches over ranks, expert parallelism, and the DeepSpeed JSONs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from alignx_ds.config.schema import FUSIONS, REGULARISED, RESTORED, OptimizerConfig, RunConfig, TrainConfig
from alignx_ds.errors import Problem
from alignx_ds.plan import deepspeed_json
from alignx_ds.plan.deepspeed_json import StageJson
from alignx_ds.training import engine as engines

ANY, WHOLE_MODEL, MOE = (0, 1, 2, 3), (0, 1, 2), (1, 2)  # ZeRO stages
ZERO_FIXES = {
    "align.deepspeed": "DeepSpeed's MoE layer does not run under ZeRO-3, and clips wrongly under ZeRO-0; "
    "use ds_configs/stage2_moe_zero2.json, or set align.ep_size=0",
    "scratch.train.deepspeed": "every rank saves the whole small model; use ds_configs/scratch_zero1.json",
    **{f"baselines.{name}.deepspeed": "use ds_configs/fusion_zero2.json" for name in FUSIONS},
}


def problems(c: RunConfig, world_size: int) -> Iterator[Problem]:
    """Of the stages that this config runs."""
    if len(set(c.baselines.make)) != len(c.baselines.make):
        yield Problem("baselines.make", c.baselines.make, "distinct names", "remove what is repeated")
    for name in FUSIONS:
        scales = getattr(c.baselines, name).drift_scale
        for axis in sorted(scales.keys() - c.axes.keys()):
            key = f"baselines.{name}.drift_scale.{axis}"
            yield Problem(key, scales[axis], f"an axis of {', '.join(c.axes)}", "correct the name")
    yield from _expert_parallel(c, world_size)
    yield from _lora(c)
    yield from _whole_models(c)
    if c.train.evaluate.patience and not c.train.evaluate.every:
        fix = "set train.evaluate.every to the steps between two evaluations"
        yield Problem("train.evaluate.patience", c.train.evaluate.patience, "0 without evaluations", fix)
    for key, stage in stages(c).items():
        yield from _steps(key, stage)
        yield from _batch(key, stage, world_size)
        allowed = _zero_stages(c, key)
        fix = "correct the stage" if allowed == ANY else ZERO_FIXES.get(f"{key}.deepspeed", "correct the stage")
        yield from StageJson(key, stage, c.model.dtype, world_size, allowed, fix).problems()


def _lora(c: RunConfig) -> Iterator[Problem]:
    if c.train.trainable != "lora":
        return
    if not c.experts.rank:
        fix = "set LoRA's rank, e.g. 16"
        yield Problem("experts.rank", 0, "at least 1 with train.trainable=lora: the factors are the expert", fix)
    if not c.train.lora.targets or len(set(c.train.lora.targets)) != len(c.train.lora.targets):
        yield Problem("train.lora.targets", c.train.lora.targets, "distinct projections, at least one", "correct it")
    fix = "set train.trainable=ffn: with LoRA the weights whose change is kept small are not trained"
    if c.train.keep.is_on:
        yield Problem("train.keep", asdict(c.train.keep), "0 with train.trainable=lora", fix)
    if REGULARISED in c.baselines.make:
        yield Problem("baselines.make", REGULARISED, "another baseline with train.trainable=lora", fix)


def _whole_models(c: RunConfig) -> Iterator[Problem]:
    """With all weights trained, what works on the AlignX layers' FFNs alone would mend or keep a part of the change."""
    if c.train.trainable != "all":
        return
    if c.train.keep.is_on:
        fix = "set train.trainable=ffn: the terms keep the FFNs alone"
        yield Problem("train.keep", asdict(c.train.keep), "0 with train.trainable=all", fix)
    if partly := [name for name in (REGULARISED, RESTORED) if name in c.baselines.make]:
        fix = "set train.trainable=ffn: they keep or restore the FFNs alone"
        yield Problem("baselines.make", ", ".join(partly), "other baselines with train.trainable=all", fix)


def without_effect(c: RunConfig) -> list[str]:
    """A line about each thing in the stages' DeepSpeed JSONs that changes nothing; they have no problems."""
    lines = []
    for key, stage in stages(c).items():
        template = engines.read_template(stage.deepspeed, f"{key}.deepspeed")
        lines += [f"{key}.deepspeed: {line}" for line in deepspeed_json.without_effect(template)]
    return lines


def stages(c: RunConfig) -> dict[str, OptimizerConfig]:
    """The training stages of the run, by the key of their settings."""
    first: dict[str, OptimizerConfig] = {"scratch.train": c.scratch.train} if c.from_scratch else {}
    fusions = {f"baselines.{name}": getattr(c.baselines, name) for name in FUSIONS if name in c.baselines.make}
    return {**first, "train": c.train, **fusions, "align": c.align}


def _zero_stages(c: RunConfig, key: str) -> tuple[int, ...]:
    """Those that the stage with these settings can run under."""
    if key == "align":
        return MOE if c.align.ep_size else ANY
    return ANY if key == "train" else WHOLE_MODEL


def _steps(key: str, stage: Any) -> Iterator[Problem]:
    if 0 < stage.steps < stage.warmup_steps:
        fix = "lower it: the learning rate would never reach its peak"
        yield Problem(f"{key}.warmup_steps", stage.warmup_steps, f"at most {key}.steps={stage.steps}", fix)
    if isinstance(stage, TrainConfig) and not stage.steps and not stage.epochs:
        yield Problem(f"{key}.epochs", stage.epochs, f"above 0 where {key}.steps is 0", f"raise it, or set {key}.steps")


def _batch(key: str, stage: OptimizerConfig, world_size: int) -> Iterator[Problem]:
    parts = world_size * max(1, stage.accumulation)
    if stage.batch % parts:
        fix = f"choose {max(1, round(stage.batch / parts)) * parts}, or change launch.ranks or {key}.accumulation"
        yield Problem(f"{key}.batch", stage.batch, f"a multiple of ranks × accumulation = {parts}", fix)


def _expert_parallel(c: RunConfig, world_size: int) -> Iterator[Problem]:
    experts, ep_size = len(c.expert_names), c.align.ep_size
    if ep_size < 1:
        return
    if experts % ep_size:
        fitting = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        fix = f"choose one of {fitting}; or 0, which keeps all experts on every rank"
        yield Problem("align.ep_size", ep_size, f"a divisor of the {experts} experts", fix)
    if world_size % ep_size:
        fix = "start as many ranks (launch.ranks), or lower align.ep_size"
        yield Problem("align.ep_size", ep_size, f"a divisor of the {world_size} ranks", fix)
