"""Whether a rank's memory holds the base model, where a stage keeps all of it on every rank."""

from __future__ import annotations

from collections.abc import Iterator

from alignx_ds.config.schema import OptimizerConfig, RunConfig
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.models.base import BaseModel
from alignx_ds.models.sharding import SHARE
from alignx_ds.plan import attention, training
from alignx_ds.runtime import memory
from alignx_ds.training import engine as engines

NEEDED = {"specialists": ("train",), "align": ("train", "align")}  # by the last step of the run; else all stages
ZERO3 = "ds_configs/stage1_zero3.json"
FIXES = {
    "train": f"use {ZERO3}",
    "align": f"use {ZERO3} with align.ep_size=0",
}


def check(c: RunConfig, base: BaseModel, world_size: int, until: str) -> None:
    """Raises ConfigError for each stage that needs the whole model on a rank which can't hold it."""
    if found := list(problems(c, base, world_size, until)):
        raise ConfigError(*found)


def problems(c: RunConfig, base: BaseModel, world_size: int, until: str, here: int | None = None) -> Iterator[Problem]:
    """One for each stage that needs the whole model on a rank of this machine which can't hold it.

    `here` ranks share the machine's memory, where no launcher says how many do; `until` is the run's last step.
    """
    if c.from_scratch:
        return
    size, room = base.size, SHARE * memory.available(here)
    if size <= room:
        return
    found = f"the weights take {size / 2**30:.1f} GiB, and a rank has room for {room / 2**30:.1f}"
    if not base.table.projections:
        fix = f"take devices with more memory: what our experts add to the attention is not shared by ranks: {found}"
        yield Problem("model.path", c.model.path, "a mixture of experts that a rank can hold", fix)
        return
    if world_size == 1:
        yield Problem("launch.ranks", 1, "ranks that share the model under ZeRO-3", f"raise it: {found}")
        return
    for key, given in attention.changed_by(c, base):
        fix = f"leave out those of the attention: they are not shared by ranks: {found}"
        yield Problem(key, given, "projections of the FFN, for a model that no rank holds", fix)
    stages = training.stages(c)
    wanted = {key: stages[key] for key in NEEDED.get(until, stages)}
    yield from _whole(wanted, c, found)


def _whole(stages: dict[str, OptimizerConfig], c: RunConfig, found: str) -> Iterator[Problem]:
    for key, stage in stages.items():
        template = engines.completed(engines.read_template(stage.deepspeed, f"{key}.deepspeed"))
        expert_parallel = key == "align" and c.align.ep_size > 0
        if template["zero_optimization"]["stage"] < 3 or expert_parallel:
            fix = FIXES.get(key, f"leave {key.split('.')[-1]} out of baselines.make")
            yield Problem(f"{key}.deepspeed", stage.deepspeed, "ZeRO-3, which shards the model", f"{fix}: {found}")
