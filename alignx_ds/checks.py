"""Everything about a config that can be known to be wrong before a process group starts, all at once."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path

from alignx_ds.config import RunConfig
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import WORLD
from alignx_ds.data.world.rows import SCHEMAS_OF_THE_WORLD
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation.judges import JUDGES
from alignx_ds.specialists.base import BaseModel
from alignx_ds.training import engine as engines

RESERVED = frozenset({"base", "generalist", "sequential", "mixed", "alignx"})


def check(config: RunConfig, world_size: int) -> BaseModel:
    """The base model, when nothing is wrong; raises ConfigError with every problem found."""
    problems = [
        *_numbers(config),
        *_choices(config),
        *_axes(config),
        *_batches(config, world_size),
        *_expert_parallel(config, world_size),
    ]
    base: BaseModel | None = None
    try:
        base = BaseModel(config.model)
        problems += _model(config, base)
    except ConfigError as error:
        problems += error.problems
    for key, path, allowed in (
        ("train.deepspeed", config.train.deepspeed, (0, 1, 2, 3)),
        ("align.deepspeed", config.align.deepspeed, (1, 2)),
    ):
        try:
            problems += _deepspeed(key, path, allowed)
        except ConfigError as error:
            problems += error.problems
    if problems or base is None:
        raise ConfigError(*problems)
    return base


def _numbers(c: RunConfig) -> Iterator[Problem]:
    at_least_one = {
        "launch.ranks": c.launch.ranks,
        "model.max_length": c.model.max_length,
        "data.train_rows": c.data.train_rows,
        "data.held_out_rows": c.data.held_out_rows,
        "train.steps": c.train.steps,
        "train.batch": c.train.batch,
        "train.accumulation": c.train.accumulation,
        "align.steps": c.align.steps,
        "align.batch": c.align.batch,
        "align.accumulation": c.align.accumulation,
        "align.ep_size": c.align.ep_size,
        "experts.feature_rows": c.experts.feature_rows,
        "gate.latent": c.gate.latent,
        "gate.fractal_dimensions": c.gate.fractal_dimensions,
        "gate.anchors": c.gate.anchors,
        "gate.output_latent": c.gate.output_latent,
        "gate.top_k": c.gate.top_k,
        "evaluation.batch": c.evaluation.batch,
        "evaluation.max_new_tokens": c.evaluation.max_new_tokens,
    }
    not_negative = {
        "seed": c.seed,
        "experts.rank": c.experts.rank,
        "train.warmup_steps": c.train.warmup_steps,
        "align.warmup_steps": c.align.warmup_steps,
        "train.weight_decay": c.train.weight_decay,
        "align.weight_decay": c.align.weight_decay,
        "align.expert_lr_scale": c.align.expert_lr_scale,
        "align.gating": c.align.gating,
        "align.drift": c.align.drift,
        "align.entropy": c.align.entropy,
        "align.prior": c.align.prior,
        "gate.fractal": c.gate.fractal,
        "gate.natural": c.gate.natural,
        "train.clip": c.train.clip,
        "align.clip": c.align.clip,
    }
    positive = {
        "train.lr": c.train.lr,
        "align.lr": c.align.lr,
        "gate.temperature": c.gate.temperature,
        "gate.granularity": c.gate.granularity,
    }
    yield from (Problem(k, v, "at least 1", "raise it") for k, v in at_least_one.items() if v < 1)
    yield from (
        Problem(k, v, "0 or more", "make it 0 or positive") for k, v in not_negative.items() if not 0 <= v < inf
    )
    yield from (
        Problem(k, v, "a finite number above 0", "make it positive") for k, v in positive.items() if not 0 < v < inf
    )
    if c.gate.scales < 2:
        yield Problem("gate.scales", c.gate.scales, "at least 2", "a slope over scales needs two of them")
    if not 0 < c.data.calibration_share < 1:
        yield Problem("data.calibration_share", c.data.calibration_share, "between 0 and 1", "0.15 is a good value")


def _choices(c: RunConfig) -> Iterator[Problem]:
    choices: dict[str, tuple[str, tuple[str, ...]]] = {
        "model.dtype": (c.model.dtype, ("float32", "bfloat16")),
        "gate.scope": (c.gate.scope, ("shared", "per_layer")),
        "generalist.schema": (c.generalist.schema, tuple(SCHEMAS)),
    }
    for name, axis in c.axes.items():
        choices[f"axes.{name}.schema"] = (axis.schema, tuple(SCHEMAS))
        choices[f"axes.{name}.judge"] = (axis.judge, tuple(JUDGES))
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            yield Problem(key, value, f"one of {', '.join(allowed)}", "choose one of them")


def _axes(c: RunConfig) -> Iterator[Problem]:
    if not c.axes:
        yield Problem("axes", {}, "at least one axis", "add an entry, e.g. axes.helpful in launch/recipes/world.yaml")
    for name, axis in c.axes.items():
        if name in RESERVED or not name.isidentifier():
            yield Problem(
                f"axes.{name}", name, f"a plain word other than {', '.join(sorted(RESERVED))}", "rename the axis"
            )
        if axis.rows < 0:
            yield Problem(f"axes.{name}.rows", axis.rows, "0 or more", "0 takes data.train_rows")
        yield from _source(f"axes.{name}.train", axis.train, axis.schema)
        yield from _source(f"axes.{name}.held_out", axis.held_out, axis.schema)
    yield from _source("generalist.train", c.generalist.train, c.generalist.schema)
    yield from _source("generalist.held_out", c.generalist.held_out, c.generalist.schema)


def _source(key: str, source: str, schema: str) -> Iterator[Problem]:
    if source == WORLD:
        if schema in SCHEMAS and schema not in SCHEMAS_OF_THE_WORLD:
            yield Problem(key, source, "a file", f"the world has no rows in the {schema} schema")
    elif not Path(source).is_file():
        yield Problem(key, source, f"a file, or '{WORLD}'", "no such file; check the path")


def _batches(c: RunConfig, world_size: int) -> Iterator[Problem]:
    for key, batch, accumulation in (
        ("train.batch", c.train.batch, c.train.accumulation),
        ("align.batch", c.align.batch, c.align.accumulation),
    ):
        parts = world_size * max(1, accumulation)
        if batch % parts:
            mend = f"choose {max(1, round(batch / parts)) * parts}, or change the ranks or the accumulation"
            yield Problem(key, batch, f"a multiple of ranks × accumulation = {parts}", mend)


def _expert_parallel(c: RunConfig, world_size: int) -> Iterator[Problem]:
    experts, ep_size = len(c.axes) + 1, c.align.ep_size
    if ep_size < 1:
        return
    if experts % ep_size:
        fitting = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        yield Problem("align.ep_size", ep_size, f"a divisor of the {experts} experts", f"choose one of {fitting}")
    if world_size % ep_size:
        mend = "start as many ranks (launch.ranks), or lower align.ep_size"
        yield Problem("align.ep_size", ep_size, f"a divisor of the {world_size} ranks", mend)
    if c.gate.top_k > experts:
        yield Problem("gate.top_k", c.gate.top_k, f"at most the {experts} experts", "lower it")


def _model(c: RunConfig, base: BaseModel) -> Iterator[Problem]:
    count = base.config.num_hidden_layers
    assert base.table is not None  # raises ConfigError on an unknown architecture
    outside = [layer for layer in c.model.layers if not 0 <= layer < count]
    if outside or len(set(c.model.layers)) != len(c.model.layers):
        yield Problem("model.layers", c.model.layers, f"distinct layers from 0 to {count - 1}", "correct the list")
    hidden = base.config.hidden_size
    for key, latent in (("gate.latent", c.gate.latent), ("gate.output_latent", c.gate.output_latent)):
        if latent > hidden:
            yield Problem(key, latent, f"at most the hidden size, {hidden}", "lower it")
        if c.gate.fractal_dimensions > latent:
            yield Problem("gate.fractal_dimensions", c.gate.fractal_dimensions, f"at most {key}, {latent}", "lower it")


def _deepspeed(key: str, path: str, allowed: tuple[int, ...]) -> Iterator[Problem]:
    template = engines.read_template(path, key)
    zero = template.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield Problem(
            key, f"{path} (zero_optimization {zero!r})", "a JSON object there", "see ds_configs/ for examples"
        )
        return
    unfilled = engines.unfilled(template)
    if unfilled:
        mend = f"write values; only {', '.join(engines.FILLED)} can be auto"
        yield Problem(key, f"{path} (auto at {', '.join(unfilled)})", "values there", mend)
        return
    stage = zero.get("stage", 0)
    if stage not in allowed:
        reason = "DeepSpeed's MoE layer does not run under ZeRO-3, and clips wrongly under ZeRO-0"
        mend = f"{reason}; use ds_configs/stage2_moe_zero2.json"
        yield Problem(key, f"{path} (ZeRO stage {stage})", f"a ZeRO stage of {', '.join(map(str, allowed))}", mend)
