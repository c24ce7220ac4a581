"""Everything about a config that can be known to be wrong before a process group starts, all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from math import inf
from pathlib import Path

from alignx_ds.config.schema import (
    FUSIONS,
    MERGES,
    SCRATCH_MODEL,
    AlignConfig,
    AxisConfig,
    FusionConfig,
    GeneralistConfig,
    RunConfig,
    TrainConfig,
)
from alignx_ds.config.values import unfit_numbers
from alignx_ds.data.schemas import QUESTIONS_ONLY, SCHEMAS, schema_problem
from alignx_ds.data.sources import WORLD, names_a_source
from alignx_ds.data.texts import SPECIAL, planned
from alignx_ds.data.world.rows import SCHEMAS_OF_THE_WORLD
from alignx_ds.errors import ConfigError, Problem, UnreachableError
from alignx_ds.evaluation.judges.endpoint import problems as endpoint_problems
from alignx_ds.evaluation.judges.registry import JUDGES
from alignx_ds.evaluation.likelihood import MEASURES
from alignx_ds.experts.adapters import WANTED, Adapter
from alignx_ds.mocae.gate import CALIBRATORS
from alignx_ds.models.base import BaseModel, Planned
from alignx_ds.models.shapes import shape
from alignx_ds.training import engine as engines

MEASURED = (*JUDGES, *MEASURES)
ENDPOINT_JUDGES = frozenset({"alpaca_eval", "honeset"})
RESERVED = frozenset({"base", "generalist", "sequential", "mixed", "alignx", *MERGES, *FUSIONS})
MOST_SCALES = 32  # the last width is ε·2³², far beyond any latent space
ZERO_STAGES = {"train": (1, 2, 3)}  # by the key of a stage's settings; elsewhere 1 or 2
Stage = TrainConfig | AlignConfig | FusionConfig


def check(config: RunConfig, world_size: int, *, weights: bool = True) -> BaseModel:
    """The base model, when nothing is wrong; raises ConfigError with every problem found.

    Without `weights`, as in a dry run, a model on an unreachable hub is known by its shape where that is shipped.
    """
    problems = [
        *unfit_numbers(asdict(config)),
        *_numbers(config),
        *_outputs(config),
        *_choices(config),
        *_axes(config),
        *_sets(config),
        *_judges(config),
        *_baselines(config),
        *_batches(config, world_size),
        *_expert_parallel(config, world_size),
    ]
    base: BaseModel | None = None
    if _from_scratch(config) and any(p.key.startswith("scratch.") for p in problems):
        raise ConfigError(*_one_each(problems))  # there is no model of such a shape, to be checked against
    try:
        base = _base_model(config, weights)
        problems += [*_model(config, base), *_adapters(config, base)]
        if weights and not _from_scratch(config) and not base.has_weights:
            fix = "save it with safetensors (save_pretrained does); weights in other formats are not read"
            problems.append(Problem("model.path", config.model.path, "a model with safetensors weights", fix))
    except ConfigError as error:
        problems += error.problems
    for key, stage in _stages(config).items():
        try:
            problems += _deepspeed(f"{key}.deepspeed", stage.deepspeed, ZERO_STAGES.get(key, (1, 2)))
        except ConfigError as error:
            problems += error.problems
    if problems or base is None:
        raise ConfigError(*_one_each(problems))
    return base


def _one_each(problems: list[Problem]) -> list[Problem]:
    """The first problem of each value: one number may break several rules."""
    return list({(p.key, repr(p.given)): p for p in reversed(problems)}.values())[::-1]


def _base_model(config: RunConfig, weights: bool) -> BaseModel:
    if _from_scratch(config):
        return BaseModel(config.model, planned(config))
    try:
        return BaseModel(config.model, weights=weights)
    except UnreachableError as error:
        known = shape(config.model.path) if not weights else None
        if known is None:
            raise ConfigError(*_unreachable(config)) from error
        return BaseModel(config.model, Planned(Path(config.model.path), known))


def _unreachable(config: RunConfig) -> list[Problem]:
    fix = "no such directory, and the hub can't be reached; check the path, or the network"
    return [Problem("model.path", config.model.path, "a model directory, a hub id, 'world' or 'scratch'", fix)]


def _stages(c: RunConfig) -> dict[str, Stage]:
    """The training stages of the run, by the key of their settings."""
    first: dict[str, Stage] = {"scratch.train": c.scratch.train} if _from_scratch(c) else {}
    fusions = {f"baselines.{name}": getattr(c.baselines, name) for name in FUSIONS if name in c.baselines.make}
    return {**first, "train": c.train, **fusions, "align": c.align}


def _from_scratch(c: RunConfig) -> bool:
    return c.model.path == SCRATCH_MODEL


def _numbers(c: RunConfig) -> Iterator[Problem]:
    at_least_one = {
        "launch.ranks": c.launch.ranks,
        "launch.timeout": c.launch.timeout,
        "model.max_length": c.model.max_length,
        "data.train_rows": c.data.train_rows,
        "data.held_out_rows": c.data.held_out_rows,
        "align.steps": c.align.steps,
        "align.ep_size": c.align.ep_size,
        "experts.feature_rows": c.experts.feature_rows,
        "gate.latent": c.gate.latent,
        "gate.rows": c.gate.rows,
        "gate.fractal_dimensions": c.gate.fractal_dimensions,
        "gate.anchors": c.gate.anchors,
        "gate.output_latent": c.gate.output_latent,
        "gate.top_k": c.gate.top_k,
        "evaluation.batch": c.evaluation.batch,
        "evaluation.max_new_tokens": c.evaluation.max_new_tokens,
        "judges.batch": c.judges.batch,
        "checkpoints.keep": c.checkpoints.keep,
        "judges.endpoint_parallel": c.judges.endpoint_parallel,
    }
    not_negative = {
        "seed": c.seed,
        "checkpoints.every": c.checkpoints.every,
        "data.records": c.data.records,
        "experts.rank": c.experts.rank,
        "align.expert_lr_scale": c.align.expert_lr_scale,
        "align.gating": c.align.gating,
        "align.drift": c.align.drift,
        "align.entropy": c.align.entropy,
        "align.prior": c.align.prior,
        "gate.fractal": c.gate.fractal,
        "gate.natural": c.gate.natural,
        "gate.lexical": c.gate.lexical,
        **{f"gate.more.{name}": weight for name, weight in c.gate.more.items()},
        **{f"evaluation.sets.{name}.rows": s.rows for name, s in c.evaluation.sets.items()},
    }
    positive = {"gate.temperature": c.gate.temperature, "gate.granularity": c.gate.granularity}
    positive |= {
        f"baselines.{name}_scale": getattr(c.baselines, f"{name}_scale") for name in ("arithmetic", "ties", "dare")
    }
    if _from_scratch(c):
        at_least_one |= {f"scratch.{name}": getattr(c.scratch, name) for name in ("hidden", "layers", "ffn")}
    for key, stage in _stages(c).items():
        at_least_one |= {f"{key}.{name}": getattr(stage, name) for name in ("batch", "accumulation")}
        not_negative |= {f"{key}.{name}": getattr(stage, name) for name in ("warmup_steps", "weight_decay", "clip")}
        positive[f"{key}.lr"] = stage.lr
        if isinstance(stage, TrainConfig):
            not_negative[f"{key}.steps"] = stage.steps
            if not stage.steps:
                positive[f"{key}.epochs"] = stage.epochs
        if isinstance(stage, FusionConfig):
            at_least_one[f"{key}.steps"] = stage.steps
            weights = ("expert_lr_scale", "gating", "drift", "entropy", "uniform")
            not_negative |= {f"{key}.{name}": getattr(stage, name) for name in weights}
        if 0 < stage.steps < stage.warmup_steps:
            fix = "the rate would never reach its height; lower it"
            yield Problem(f"{key}.warmup_steps", stage.warmup_steps, f"at most {key}.steps={stage.steps}", fix)
    yield from (Problem(k, v, "at least 1", "raise it") for k, v in at_least_one.items() if v < 1)
    yield from (
        Problem(k, v, "0 or more", "make it 0 or positive") for k, v in not_negative.items() if not 0 <= v < inf
    )
    yield from (
        Problem(k, v, "a finite number above 0", "make it positive") for k, v in positive.items() if not 0 < v < inf
    )
    for name in sorted(set(c.gate.more) - set(CALIBRATORS)):
        known = f"a calibrator of {', '.join(CALIBRATORS) or 'CALIBRATORS, which has none'}"
        yield Problem(f"gate.more.{name}", c.gate.more[name], known, "docs/extending.md says how one is added")
    if not 2 <= c.gate.scales <= MOST_SCALES:
        fix = "a slope over scales needs two of them, and each doubles the width"
        yield Problem("gate.scales", c.gate.scales, f"2 to {MOST_SCALES}", fix)
    for key, share in (("calibration_share", c.data.calibration_share), ("held_out_share", c.data.held_out_share)):
        if not 0 < share < 1:
            yield Problem(f"data.{key}", share, "between 0 and 1", "0.15 is a good value")


def _outputs(c: RunConfig) -> Iterator[Problem]:
    if not c.output.strip():
        yield Problem("output", c.output, "a directory", "name one that the run may make, e.g. runs/mine")


def _choices(c: RunConfig) -> Iterator[Problem]:
    choices: dict[str, tuple[str, tuple[str, ...]]] = {
        "model.dtype": (c.model.dtype, ("float32", "bfloat16")),
        "gate.scope": (c.gate.scope, ("shared", "per_layer")),
        "nonfinite": (c.nonfinite, ("stop", "skip")),
        "generalist.schema": (c.generalist.schema, tuple(SCHEMAS)),
    }
    for name, axis in c.axes.items():
        choices[f"axes.{name}.schema"] = (axis.schema, tuple(SCHEMAS))
        if axis.held_out_schema:
            choices[f"axes.{name}.held_out_schema"] = (axis.held_out_schema, tuple(SCHEMAS))
        choices[f"axes.{name}.judge"] = (axis.judge or MEASURED[0], MEASURED)
    for name, text in c.scratch.texts.items():
        choices[f"scratch.texts.{name}.schema"] = (text.schema, tuple(SCHEMAS))
    for name, s in c.evaluation.sets.items():
        choices[f"evaluation.sets.{name}.schema"] = (s.schema, tuple(SCHEMAS))
        choices[f"evaluation.sets.{name}.judge"] = (s.judge, MEASURED)
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
        if axis.schema in QUESTIONS_ONLY:
            fix = "give it as evaluation.sets, and train the axis on another"
            yield Problem(f"axes.{name}.schema", axis.schema, "a schema with answers to imitate", fix)
        yield from _source(f"axes.{name}", "train", axis.train, axis.schema, axis.columns)
        yield from _held_out(f"axes.{name}", axis)
    g = c.generalist
    if g.train:
        yield from _source("generalist", "train", g.train, g.schema, g.columns)
        yield from _held_out("generalist", g)
    elif g.held_out:
        yield Problem("generalist.held_out", g.held_out, "nothing", "without generalist.train there is no generalist")


def _held_out(key: str, settings: AxisConfig | GeneralistConfig) -> Iterator[Problem]:
    if settings.held_out:
        yield from _source(key, "held_out", settings.held_out, *settings.judged_as())
    elif settings.train == WORLD:
        yield Problem(f"{key}.held_out", "", WORLD, "the world makes its held-out rows itself; set it to 'world'")


def _sets(c: RunConfig) -> Iterator[Problem]:
    for name, s in c.evaluation.sets.items():
        if name in RESERVED or name in c.axes or not name.isidentifier():
            fix = "rename the set; axes and systems have that name"
            yield Problem(f"evaluation.sets.{name}", name, "a plain word of its own", fix)
        yield from _source(f"evaluation.sets.{name}", "source", s.source, s.schema, s.columns)
    if _from_scratch(c):
        if not c.scratch.texts:
            yield Problem("scratch.texts", {}, "at least one source", "name what the base model reads")
        if c.scratch.vocabulary < 256 + len(SPECIAL):
            yield Problem("scratch.vocabulary", c.scratch.vocabulary, "at least 261: bytes and marks", "raise it")
        if c.scratch.heads < 1 or c.scratch.hidden % (2 * c.scratch.heads):
            fix = "rotary positions need an even size per head; correct scratch.heads"
            yield Problem("scratch.hidden", c.scratch.hidden, "an even multiple of scratch.heads", fix)
        for name, text in c.scratch.texts.items():
            yield from _source(f"scratch.texts.{name}", "source", text.source, text.schema, text.columns)


def _judges(c: RunConfig) -> Iterator[Problem]:
    asked = {axis.judge for axis in c.axes.values()} | {s.judge for s in c.evaluation.sets.values()}
    if asked & ENDPOINT_JUDGES:
        yield from endpoint_problems(c.judges)
    rows = c.judges.classifier_rows
    if "offline_safety" in asked and (rows in ("", WORLD) or not names_a_source(rows)):
        fix = "set it to BeaverTails rows that the judge may learn from"
        yield Problem("judges.classifier_rows", rows, "a file, or a data set's id", fix)
    if "offline_safety" in asked and not c.data.held_out_share <= c.judges.classifier_held_out < 1:
        fix = "raise it, or the judge learns from questions that the axis is judged on"
        allowed = f"at least data.held_out_share={c.data.held_out_share}, below 1"
        yield Problem("judges.classifier_held_out", c.judges.classifier_held_out, allowed, fix)
    if "alpaca_eval" in asked and c.judges.reference and not Path(c.judges.reference).is_file():
        fix = "no such file; leave it empty where the rows bring their own references"
        yield Problem("judges.reference", c.judges.reference, "a file", fix)


def _baselines(c: RunConfig) -> Iterator[Problem]:
    names, known = c.baselines.make, (*MERGES, *FUSIONS)
    if len(set(names)) != len(names) or not set(names) <= set(known):
        yield Problem("baselines.make", names, f"distinct names out of {', '.join(known)}", "correct the list")
    for name in ("ties", "dare"):
        density = getattr(c.baselines, f"{name}_density")
        if not 0 < density <= 1:
            yield Problem(f"baselines.{name}_density", density, "above 0 and at most 1", "1 keeps every entry")


def _source(key: str, name: str, source: str, schema: str, columns: dict[str, str]) -> Iterator[Problem]:
    if schema not in SCHEMAS:
        return
    if source == WORLD and schema not in SCHEMAS_OF_THE_WORLD:
        yield Problem(f"{key}.{name}", source, "a file", f"the world has no rows in the {schema} schema")
    if not names_a_source(source):
        fix = "no such file; check the path"
        yield Problem(f"{key}.{name}", source, f"a file, a data set's id, or '{WORLD}'", fix)
    if problem := schema_problem(schema, columns):
        yield Problem(f"{key}.columns", columns, "columns of the schema", problem)


def _batches(c: RunConfig, world_size: int) -> Iterator[Problem]:
    for key, stage in _stages(c).items():
        parts = world_size * max(1, stage.accumulation)
        if stage.batch % parts:
            fix = f"choose {max(1, round(stage.batch / parts)) * parts}, or change launch.ranks or {key}.accumulation"
            yield Problem(f"{key}.batch", stage.batch, f"a multiple of ranks × accumulation = {parts}", fix)


def _expert_parallel(c: RunConfig, world_size: int) -> Iterator[Problem]:
    experts, ep_size = len(c.axes) + 1, c.align.ep_size
    if ep_size < 1:
        return
    if experts % ep_size:
        fitting = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        yield Problem("align.ep_size", ep_size, f"a divisor of the {experts} experts", f"choose one of {fitting}")
    if world_size % ep_size:
        fix = "start as many ranks (launch.ranks), or lower align.ep_size"
        yield Problem("align.ep_size", ep_size, f"a divisor of the {world_size} ranks", fix)
    if c.gate.top_k > experts:
        yield Problem("gate.top_k", c.gate.top_k, f"at most the {experts} experts", "lower it")


def _adapters(c: RunConfig, base: BaseModel) -> Iterator[Problem]:
    for name, path in ((name, axis.adapter) for name, axis in c.axes.items() if axis.adapter):
        key = f"axes.{name}.adapter"
        if _from_scratch(c):
            fix = "remove it: no adapter can have been trained on a model that is not there yet"
            yield Problem(key, path, "nothing where model.path is 'scratch'", fix)
            continue
        try:
            yield from Adapter(path, key).problems(base)
        except ConfigError as error:
            yield from error.problems
        except UnreachableError:
            yield Problem(key, path, WANTED, "no such directory, and the hub can't be reached; check the path")


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
        fix = f"write values; only {', '.join(engines.FILLED)} can be auto"
        yield Problem(key, f"{path} (auto at {', '.join(unfilled)})", "values there", fix)
        return
    stage = zero.get("stage", 0)
    if stage not in allowed:
        fix = {
            "align.deepspeed": "DeepSpeed's MoE layer does not run under ZeRO-3, and clips wrongly under ZeRO-0; "
            "use ds_configs/stage2_moe_zero2.json",
            "scratch.train.deepspeed": "every rank saves the whole small model; use ds_configs/scratch_zero1.json",
            **{f"baselines.{name}.deepspeed": "use ds_configs/fusion_zero2.json" for name in FUSIONS},
        }.get(key, "correct the stage")
        yield Problem(key, f"{path} (ZeRO stage {stage})", f"a ZeRO stage of {', '.join(map(str, allowed))}", fix)
