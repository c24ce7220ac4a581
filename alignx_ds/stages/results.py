"""The trained results of a run: what each would be made from now, and whether that agrees with what is on disk.

A finished result is reused when its manifest has the same fingerprint. So a key of the recipe that no finished result
depends on may change between two starts; one that a finished result depends on makes it another run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from alignx_ds.config.schema import FUSIONS, RESTORED
from alignx_ds.data.rows import Row
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import changed_keys
from alignx_ds.stages import align, finetune, fuse, restore, scratch
from alignx_ds.stages.stage import Stage, StageContext, foreign

ROWS = ("axes", "generalist", "data", "model.max_length", "seed")  # what decides which rows are trained on, and how
BASE = ("model.path", "model.template_args", "scratch", *ROWS)
STAGE1 = (*BASE, "model", "train", "experts")  # all that a specialist's fingerprint covers
KEYS: dict[str, tuple[str, ...]] = {  # by name of an input of a stage: the recipe's keys that may change it
    "texts": (*ROWS, "scratch", "evaluation.sets"),
    "tokenizer": (*ROWS, "scratch", "evaluation.sets"),
    "architecture": ("scratch",),
    "max_length": ("model.max_length",),
    "base": BASE,
    "layers": ("model.layers", "model.path", "scratch"),
    "dtype": ("model.dtype",),
    "seed": ("seed",),
    "rows": BASE,
    "train": ("train", "scratch.train"),
    "experts": ("experts",),
    "adapter": ("axes",),
    "start": STAGE1,
    "keep": (*STAGE1, "baselines.sequential_regularised"),
    "evaluated": STAGE1,
    "specialists": STAGE1,
    "align": ("align",),
    "gate": ("gate",),
    "stage": ("baselines.{label}",),
    "deepspeed": ("train.deepspeed", "align.deepspeed", "scratch.train.deepspeed", "baselines.{label}.deepspeed"),
}


def planned(context: StageContext, texts: list[Row]) -> Iterator[Stage]:
    """Every stage of the run in its order. After a base model from scratch that is not there yet nothing is known."""
    if context.config.from_scratch:
        base = scratch.stage_of(context, texts)
        yield base
        if not manifest.is_current(base.directory, base.inputs):
            return
    axes, fingerprints = list(context.config.axes), dict[str, str]()
    for tune in [*finetune.specialists(context.config), *finetune.baseline_fine_tunes(context.config)]:
        stage = finetune.stage_of(context, tune, fingerprints)
        fingerprints[tune.name] = manifest.fingerprint(stage.inputs)
        yield stage
    yield align.stage_of(context, {axis: fingerprints[axis] for axis in axes})
    if RESTORED in context.config.baselines.make:
        sequence = fingerprints[finetune.sequential_name(axes)]
        yield restore.stage_of(context, sequence, [fingerprints[axis] for axis in axes])
    for name in FUSIONS:
        if name in context.config.baselines.make:
            yield fuse.stage_of(context, name, [fingerprints[axis] for axis in axes])


def check(context: StageContext, texts: list[Row], *, baselines: bool = True) -> None:
    """Raises ConfigError when a finished result was made with another recipe than this; it is not touched.

    Of a shared directory only what this start makes is compared: without `baselines`, the specialists alone.
    What the recipe does not say may have changed: the rows in a file, a chat template. `ensure` makes the result again.
    """
    if not has_any(context):
        return
    changed = changed_keys(context.config)
    results, keys = [], list[str]()
    for stage in planned(context, texts):
        differing = _differing(stage)
        if stage.shared:
            if differing and (baselines or stage.label in context.config.axes):
                raise foreign(stage)
            continue
        prefixes = {prefix.format(label=stage.label) for name in differing for prefix in KEYS.get(name, ())}
        if blamed := [key for key in changed if any(_is_below(key, prefix) for prefix in prefixes)]:
            results.append(stage.label)
            keys += blamed
    if keys:
        made, fix = ", ".join(results), "choose another output, or remove the directory"
        fix = f"it holds {made}, made with another {', '.join(dict.fromkeys(keys))}; {fix}"
        raise ConfigError(Problem("output", context.config.output, "this run's own directory", fix))


def finished(context: StageContext, texts: list[Row]) -> dict[str, bool]:
    """By finished result: whether it will be reused. Its files are not read."""
    stages = planned(context, texts) if has_any(context) else ()
    return {s.label: not _differing(s) for s in stages if (s.directory / manifest.NAME).is_file()}


def _is_below(key: str, prefix: str) -> bool:
    return f"{key.split()[0]}.".startswith(f"{prefix}.")


def has_any(context: StageContext) -> bool:
    """Whether anything of this run is finished: only then is it worth to compute the fingerprints."""
    out = context.out
    places = (out.base, out.model, *out.specialists.glob("*"), *out.baselines.glob("*"))
    return any((place / manifest.NAME).is_file() for place in places)


def _differing(stage: Stage) -> list[str]:
    """The names of those inputs that differ from the finished result's. Raises DataError for a damaged manifest."""
    if not (stage.directory / manifest.NAME).is_file():
        return []
    made, now = manifest.read(stage.directory)["inputs"], json.loads(json.dumps(stage.inputs))
    return sorted(name for name in {*made, *now} if made.get(name) != now.get(name))
