"""`--dry-run`: what the run will train, and an estimate of the memory and the disk space that it needs."""

from __future__ import annotations

import torch

from alignx_ds.config.parse import to_yaml
from alignx_ds.config.schema import FUSIONS, RunConfig
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.data.inputs import EncodedData, RunInputs, read_inputs
from alignx_ds.data.splits import read_splits
from alignx_ds.errors import Problem, UnreachableError
from alignx_ds.models.base import BaseModel
from alignx_ds.plan import capacity, prompts, training
from alignx_ds.plan.accounts import accounts, compared, line, notes
from alignx_ds.plan.deepspeed_keys import deepspeed_models
from alignx_ds.plan.gpu_memory import problems
from alignx_ds.plan.memory import Lengths, Rows, StageMemory, memory
from alignx_ds.plan.sizes import counts, disk
from alignx_ds.runs.outputs import Outputs
from alignx_ds.stages import results
from alignx_ds.stages.stage import StageContext
from alignx_ds.training.engine import steps_of

GIB, MIB = 2**30, 2**20
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buckets", "step", "peak")


def describe(
    config: RunConfig,
    base: BaseModel,
    world_size: int,
    *,
    show_config: bool = False,
    until: str = "run",
    gpu_memory: float | None = None,
) -> tuple[str, list[Problem]]:
    """(the plan as text, and after it the resolved config if wanted; the stages that are too large for a GPU with
    `gpu_memory` bytes). The text names what can't be checked without the hub.

    `until` is the run's last step: specialists, align or run.
    """
    on_gpu = gpu_memory is not None or torch.cuda.is_available()
    rows, steps, finished, unchecked, lengths = _rows(config, base, until == "run")
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
        f"memory per rank on {world_size} ranks, while a {'GPU' if on_gpu else 'CPU'} trains, at most": _memory(
            config, memory(config, base, lengths, world_size, on_gpu=on_gpu)
        ),
        "refused on this machine": [] if gpu_memory else _refused(config, base, world_size, until),
        "disk space, at most": _sizes(disk(config, base)),
        "DeepSpeed": [f"  {line}" for line in training.without_effect(config)],
        "not checked": [f"  {what}" for what in unchecked],
        "config": to_yaml(config).rstrip().splitlines() if show_config else [],
    }
    text = "\n\n".join("\n".join([title, *lines]) for title, lines in sections.items() if lines)
    done = "everything is checked" if not unchecked else "everything else is checked"
    found = [] if gpu_memory is None else list(problems(config, base, lengths, world_size, gpu_memory, until))
    return f"{text}\n\ndry run: {done}, nothing is written", found


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
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{gib * GIB / MIB:,.1f} MiB"


def _refused(config: RunConfig, base: BaseModel, world_size: int, until: str) -> list[str]:
    """What the run would be refused for by the memory of this machine, which need not be the one that trains."""
    return [f"  {problem}" for problem in capacity.problems(config, base, world_size, until, here=world_size)]


def _memory(config: RunConfig, stages: dict[str, StageMemory]) -> list[str]:
    """A line of the table for each stage, and what the columns mean."""
    unit, size = ("GiB", GIB) if max(s.peak for s in stages.values()) >= GIB else ("MiB", MIB)
    lines = [f"  {unit:<26}" + "".join(f"{name:>12}" for name in PARTS)]
    for key, stage in stages.items():
        z = stage.zero
        parts = (z.parameters, z.gradients, z.optimizer, stage.activations, stage.logits, stage.buckets, z.step)
        numbers = "".join(f"{part / size:>12,.1f}" for part in (*parts, stage.peak))
        lines.append(f"  {f'{key} (ZeRO-{z.stage})':<26}{numbers}")
    for key, stage in stages.items():
        setting = training.stages(config)[key].checkpoint_activations
        if stage.instead is not None:
            lines.append(
                f"  {key}: layers are recomputed (checkpoint_activations={setting}), else {stage.instead / size:,.1f}"
            )
        if stage.zero.in_ram:
            lines.append(f"  {key}: {stage.zero.in_ram / size:,.1f} more in RAM, where its DeepSpeed JSON offloads")
    return [*lines, "  not all parts are there at once, so the peak is less than their sum"]


def _rows(
    config: RunConfig, base: BaseModel, baselines: bool
) -> tuple[list[str], list[str], list[str], list[str], Rows]:
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
        *compared(data),
        line("all axes, for stage 2", f"{len(data.train.examples):,}", stage2),
        *notes(config, data),
    ]
    return rows, _steps(config, inputs), _finished(config, inputs, baselines), unchecked, lengths_of(data)


def lengths_of(data: EncodedData) -> Rows:
    """Of the training rows of each stage that has the run's own."""
    taught = [length for axis in data.injected for length in _of_rows(data.taught(axis))]
    plain = [Lengths(len(e.ids), e.learned_length) for e in data.train.examples]
    return {"train": taught, "align": plain, **{f"baselines.{name}": plain for name in FUSIONS}}


def _of_rows(rows: LabelledExamples) -> list[Lengths]:
    answers = [e.learned_length for e in rows.examples]
    if rows.others:
        answers = [a + e.learned_length for a, e in zip(answers, rows.others, strict=True)]
    return [Lengths(whole, answer) for whole, answer in zip(rows.lengths, answers, strict=True)]


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
    for axis in inputs.data.injected:
        count = len(inputs.data.taught(axis).examples)
        jobs[f"specialist {axis}"] = (steps_of(config.train, count), config.train.batch)
    jobs["stage 2"] = (config.align.steps, config.align.batch)
    for name in FUSIONS:
        if name in config.baselines.make:
            stage = getattr(config.baselines, name)
            jobs[name] = (stage.steps, stage.batch)
    return [line(name, f"{steps:,}", f" with {batch:,} rows each") for name, (steps, batch) in jobs.items()]
