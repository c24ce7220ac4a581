"""`--dry-run`: what the run will train, and an estimate of the memory and the disk space that it needs."""

from __future__ import annotations

from alignx_ds.config.parse import to_yaml
from alignx_ds.config.schema import FUSIONS, RunConfig
from alignx_ds.data.inputs import EncodedData, RunInputs, read_inputs
from alignx_ds.data.splits import read_splits
from alignx_ds.errors import UnreachableError
from alignx_ds.models.base import BaseModel
from alignx_ds.plan import prompts, training
from alignx_ds.plan.accounts import accounts, line, notes
from alignx_ds.plan.deepspeed_keys import deepspeed_models
from alignx_ds.plan.sizes import counts, disk, memory
from alignx_ds.runs.outputs import Outputs
from alignx_ds.stages import results
from alignx_ds.stages.activations import activations
from alignx_ds.stages.stage import StageContext
from alignx_ds.training.engine import steps_of

MIB_PER_GIB = 1024


def describe(
    config: RunConfig, base: BaseModel, world_size: int, *, show_config: bool = False, baselines: bool = True
) -> str:
    """The plan as text, and after it the resolved config if wanted. It names what can't be checked without the hub.

    `baselines`: whether the run goes on to them after stage 2.
    """
    rows, steps, finished, unchecked, lengths = _rows(config, base, baselines)
    written = prompts.facts(base) if base.has_tokenizer else {}
    if not deepspeed_models():
        unchecked = [*unchecked, "names and types within zero_optimization and the other blocks: DeepSpeed is missing"]
    sections = {
        f"plan of {config.output}": _summary(config, base, world_size),
        "prompts and answers": [f"  {name:<28}{fact}" for name, fact in written.items()],
        "rows": rows,
        "optimizer steps": steps,
        "finished already": finished,
        "parameters": [line(name, f"{count:,}") for name, count in counts(config, base).items()],
        f"memory per rank on {world_size} ranks, without activations": _sizes(memory(config, base, world_size)),
        "activations of a micro batch per rank, at most": _activations(config, base, world_size, lengths),
        "disk space, at most": _sizes(disk(config, base)),
        "DeepSpeed": [f"  {line}" for line in training.without_effect(config)],
        "not checked": [f"  {what}" for what in unchecked],
        "config": to_yaml(config).rstrip().splitlines() if show_config else [],
    }
    text = "\n\n".join("\n".join([title, *lines]) for title, lines in sections.items() if lines)
    done = "everything is checked" if not unchecked else "everything else is checked"
    return f"{text}\n\ndry run: {done}, nothing is written"


def _summary(config: RunConfig, base: BaseModel, world_size: int) -> list[str]:
    ep_size = config.align.ep_size
    spread = f"with align.ep_size={ep_size}" if ep_size else "with all experts on each in stage 2 (align.ep_size=0)"
    layers = f"{len(base.layers)} of {base.config.num_hidden_layers} layers: {', '.join(map(str, base.layers))}"
    return [
        f"  {'model':<28}{config.model.path}, {config.model.dtype}",
        f"  {'AlignX layers':<28}{layers}",
        f"  {'experts':<28}{', '.join(config.expert_names)}",
        f"  {'baselines':<28}{', '.join(['sequential', 'mixed', *config.baselines.make])}",
        f"  {'ranks':<28}{world_size}, {spread}",
    ]


def _sizes(sizes: dict[str, float]) -> list[str]:
    """Of GiB."""
    return [line(name, _size(gib)) for name, gib in sizes.items()]


def _size(gib: float) -> str:
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{gib * MIB_PER_GIB:,.1f} MiB"


def _activations(config: RunConfig, base: BaseModel, world_size: int, lengths: dict[str, list[int]]) -> list[str]:
    """By stage, and whether they are recomputed. Where a stage's rows are not known, all are model.max_length long."""
    lines = []
    for key, stage in training.stages(config).items():
        rows, setting = lengths.get(key) or [config.model.max_length] * stage.batch, stage.checkpoint_activations
        found = activations(config, base, key, stage, rows, world_size)
        instead = _size(found.recomputed / 2**30)
        note = f"recomputed in the backward pass, so {instead}" if found.recompute(setting) else "kept"
        lines.append(line(key, _size(found.kept / 2**30), f"  {note} (checkpoint_activations={setting})"))
    return lines


def _rows(
    config: RunConfig, base: BaseModel, baselines: bool
) -> tuple[list[str], list[str], list[str], list[str], dict[str, list[int]]]:
    """(rows used and why others are not, optimizer steps, finished results, what could not be checked, rows' lengths).

    Raises ConfigError when a finished result was made with another recipe.
    """
    unchecked: list[str] = []
    if not base.has_tokenizer and not config.from_scratch:
        shape = "the hub can't be reached; the shape that ships with the package is used"
        unchecked.append(f"{config.model.path}: {shape}")
    elif not config.from_scratch and not base.has_weights:
        unchecked.append(f"{config.model.path}: names and shapes of the weights, which are not there")
    try:
        if not base.has_tokenizer and not config.from_scratch:
            rows = accounts(read_splits(config))
            return rows, [], [], [*unchecked, "lengths of the rows in tokens: the tokenizer is missing"], {}
        inputs = read_inputs(config, base)
    except UnreachableError as error:
        return [], [], [], [*unchecked, str(error)], {}
    data = inputs.data
    stage2 = f" to train on, {len(data.calibration_rows.examples):,} in the calibration split"
    rows = [
        *accounts(data.splits, data.joined),
        line("all axes, for stage 2", f"{len(data.train.examples):,}", stage2),
        *notes(config, data),
    ]
    return rows, _steps(config, inputs), _finished(config, inputs, baselines), unchecked, _lengths(data)


def _lengths(data: EncodedData) -> dict[str, list[int]]:
    """In tokens, of the training rows of each stage that has the run's own."""
    injected = [len(e.ids) for examples in data.injected.values() for e in examples]
    plain = [len(e.ids) for e in data.train.examples]
    return {"train": injected, "align": plain, **{f"baselines.{name}": plain for name in FUSIONS}}


def _finished(config: RunConfig, inputs: RunInputs, baselines: bool) -> list[str]:
    """What the output directory holds already. Nothing is known about it without the base model's weights."""
    context = StageContext(config, inputs.base, inputs.data, Outputs.of(config))
    if not (config.from_scratch or inputs.base.has_weights):
        return []
    results.check(context, inputs.texts, baselines=baselines)
    states = {True: "reused", False: "made again, its inputs have changed"}
    return [f"  {name:<28}{states[current]}" for name, current in results.finished(context, inputs.texts).items()]


def _steps(config: RunConfig, inputs: RunInputs) -> list[str]:
    jobs = {}
    if inputs.texts:
        jobs["base model"] = (steps_of(config.scratch.train, len(inputs.texts)), config.scratch.train.batch)
    for axis, examples in inputs.data.injected.items():
        jobs[f"specialist {axis}"] = (steps_of(config.train, len(examples)), config.train.batch)
    jobs["stage 2"] = (config.align.steps, config.align.batch)
    for name in FUSIONS:
        if name in config.baselines.make:
            stage = getattr(config.baselines, name)
            jobs[name] = (stage.steps, stage.batch)
    return [line(name, f"{steps:,}", f" with {batch:,} rows each") for name, (steps, batch) in jobs.items()]
