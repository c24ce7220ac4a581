"""The skeleton that all training stages share: reuse the result or make it, set up an engine, train, clean up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from alignx_ds.config.parse import to_yaml
from alignx_ds.config.schema import OptimizerConfig, RunConfig
from alignx_ds.data.encode import LabelledExamples, pad_token
from alignx_ds.data.inputs import EncodedData
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import lock, manifest
from alignx_ds.runs.lock import Lock
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import attention, console, distributed, memory
from alignx_ds.runtime.versions import version
from alignx_ds.stages.activations import activations, recompute
from alignx_ds.training import engine as engines
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.loop import StepLoss, largest_micro_batch, micro_batches, train
from alignx_ds.training.manager import CheckpointManager
from alignx_ds.training.metrics import Losses, ScalarLogger, tensorboard
from alignx_ds.training.nonfinite import NonFiniteSteps
from alignx_ds.training.speed import Cost, peak_flops
from alignx_ds.training.trackers import tracked

VERSIONED = ("alignx-ds", "torch", "deepspeed", "transformers")  # noted with a result, which is reused with any other


@dataclass(frozen=True)
class StageContext:
    """What all stages of a run share."""

    config: RunConfig
    base: BaseModel
    data: EncodedData
    out: Outputs
    logger: Callable[[Path], ScalarLogger] = tensorboard  # writes a job's curve into a directory


@dataclass(frozen=True)
class Stage:
    """One training stage: what it leaves behind, and what that depends on."""

    label: str  # what users know it by, e.g. helpful
    job: str  # the name of its checkpoints and its curve, e.g. stage1/helpful
    directory: Path  # of its result
    inputs: dict[str, Any]  # provenance: everything that the result depends on
    shared: bool = False  # other runs may use what lies in its directory, so nothing there is ever replaced


Make = Callable[[TrainingJob], dict[str, Any]]  # writes the result's files and returns facts for its manifest


def ensure(stage: Stage, context: StageContext, make: Make) -> Path:
    """Reuse the stage's result when it was made from the same inputs; otherwise make it. Returns its directory.

    Raises DataError when the result differs from its manifest, ConfigError when it may not be replaced, and what
    `make` raises. Collective.
    """
    job = training_job(stage, context)
    place = stage.directory
    with Lock(place.with_name(f"{place.name}.{lock.NAME}"), "specialists", str(place.parent)) as own:
        if stage.shared and not _is_current(stage):
            distributed.on_main(own.take)  # the lock of the output does not cover what is shared
        if _is_current(stage):
            others = distributed.on_main(partial(_other_versions, place))
            console.say(f"{stage.label}: unchanged, reused from {place}{others}")
        else:
            distributed.on_main(lambda: _clear(stage))
            mark = manifest.fingerprint(stage.inputs)
            with tracked(context.config.trackers, job, mark, context.out.root) as followed:
                facts = make(followed)
            memory.free()  # before the next model of this process is made
            distributed.barrier()  # all ranks have written their files
            facts = {"versions": {name: version(name) for name in VERSIONED}} | facts
            distributed.on_main(lambda: manifest.write(place, stage.inputs, facts))
    if job.checkpoints:
        job.checkpoints.finish()
    return stage.directory


def _is_current(stage: Stage) -> bool:
    return distributed.on_main(lambda: manifest.is_current(stage.directory, stage.inputs))


def _other_versions(directory: Path) -> str:
    """The versions that have changed since the result was made, for the message that it is reused."""
    made = manifest.read(directory).get("versions", {})
    others = [f"{name} {then}" for name, then in made.items() if name in VERSIONED and then != version(name)]
    return f" (made with {', '.join(others)})" if others else ""


def training_job(stage: Stage, context: StageContext) -> TrainingJob:
    """Its checkpoints, its curve, and its policy for non-finite steps, as the recipe asks for them."""
    c, out = context.config, context.out
    resolved = cache(partial(to_yaml, c))  # costs more than a small job's step, and many jobs save no checkpoint
    checkpoints = CheckpointManager(stage.job, stage.inputs, out.checkpoints, c.checkpoints, c.seed, resolved)
    decode = context.base.tokenizer.decode
    nonfinite = NonFiniteSteps(out.nonfinite / stage.job, c.nonfinite == "skip", lambda ids: str(decode(ids)))
    return TrainingJob(stage.job, checkpoints, nonfinite, context.logger(out.tensorboard / stage.job))


def _clear(stage: Stage) -> None:
    """Leave an empty directory for the result. Raises ConfigError where that would remove what other runs may use."""
    if stage.shared and stage.directory.is_dir() and any(stage.directory.iterdir()):
        raise foreign(stage)
    if (stage.directory / manifest.NAME).exists():
        console.say(f"{stage.label}: its inputs have changed since it was made, so it is made again")
    shutil.rmtree(stage.directory, ignore_errors=True)
    stage.directory.mkdir(parents=True)


def foreign(stage: Stage) -> ConfigError:
    """Of a result in a shared directory that this run did not make and may not replace."""
    fix = f"{stage.label} there was made from other inputs, or is no specialist; choose another directory"
    return ConfigError(Problem("specialists", str(stage.directory.parent), "specialists of this config", fix))


@dataclass(frozen=True)
class Setup:
    """How a stage trains: the numbers of its plan, the DeepSpeed config filled with them, and what its layers keep."""

    plan: engines.Plan
    deepspeed: dict[str, Any]
    recompute: bool  # whether the layers recompute their activations


def set_up(context: StageContext, settings: OptimizerConfig, key: str, steps: int, rows: LabelledExamples) -> Setup:
    """Of the recipe's section `key`, for so many steps on `rows`. Raises ConfigError under `key`.deepspeed."""
    plan = engines.Plan.of(settings, context.config.model.dtype, steps)
    template = engines.read_template(settings.deepspeed, f"{key}.deepspeed")
    base, world_size, lengths = context.base, distributed.world_size(), rows.lengths
    kept = activations(context.config, base, key, settings, lengths, world_size)
    filled = engines.fill(template, plan, world_size, base.config.hidden_size)
    return Setup(plan, filled, kept.recompute(settings.checkpoint_activations))


@contextmanager
def trained(
    context: StageContext,
    setup: Setup,
    model: nn.Module,
    groups: list[dict[str, Any]],
    rows: LabelledExamples,
    step_loss: StepLoss,
    job: TrainingJob,
    *,
    title: str,
    flops: float,
    packed: bool = False,
) -> Iterator[tuple[Any, Losses]]:
    """Train `model` on `rows`; within the block its engine, and so its shards, are there; afterwards it has ended.

    `groups` are the optimizer's parameter groups, `flops` what a token needs. `packed`: several rows share a line of a
    micro batch. Yields the trained module and the loss of every step. Raises Stopped and DataError as `train` does.
    Collective.
    """
    if setup.recompute:
        recompute(model)
    attention.choose(getattr(model, "backbone", model), context.config.model.attention)
    engine = engines.start(model, groups, setup.deepspeed, setup.plan)
    job = replace(job, cost=Cost(flops, peak_flops(context.base.dtype, context.config.launch.peak_tflops)))
    given = rows, setup.plan, pad_token(context.base.tokenizer), context.config.seed
    batches, largest = partial(micro_batches, *given, packed=packed), largest_micro_batch(*given, packed=packed)
    with console.progress(title, setup.plan.steps) as bar:
        losses = train(engine, batches, step_loss, setup.plan, bar, job, largest)
    yield engine.module, losses
    engines.end(engine)
