"""`--dry-run`: the resolved config, what will be trained, and an estimate of the memory and of the disk it takes."""

from __future__ import annotations

from alignx_ds.config.parse import to_yaml
from alignx_ds.config.schema import SCRATCH_MODEL, RunConfig
from alignx_ds.data.inputs import read_inputs
from alignx_ds.data.splits import DataSplits, SplitRows, read_splits
from alignx_ds.errors import UnreachableError
from alignx_ds.models.base import BaseModel
from alignx_ds.plan.sizes import counts, disk, memory
from alignx_ds.training.engine import steps_of


def describe(config: RunConfig, base: BaseModel, world_size: int) -> str:
    """The plan. What the hub would have to tell, and can't now, is named."""
    lines = [to_yaml(config).rstrip(), "", "parameters"]
    lines += [f"  {name:<24}{count:>16,}" for name, count in counts(config, base).items()]
    lines += ["", f"memory per rank, {world_size} ranks, without activations"]
    lines += [f"  {name:<28}{gib:>12.3f} GiB" for name, gib in memory(config, base, world_size).items()]
    lines += ["", "room on the disk, at most"]
    lines += [f"  {name:<28}{gib:>12.3f} GiB" for name, gib in disk(config, base).items()]
    rows, unchecked = _rows(config, base)
    lines += ["", "rows", *rows]
    done = "everything checked" if not unchecked else "checked all but what is named here"
    return "\n".join([*lines, *(f"not checked: {what}" for what in unchecked), "", f"dry run: {done}, nothing written"])


def _rows(config: RunConfig, base: BaseModel) -> tuple[list[str], list[str]]:
    """(what becomes of the rows, what could not be checked)."""
    unchecked: list[str] = []
    if not base.has_tokenizer and config.model.path != SCRATCH_MODEL:
        unchecked.append(
            f"{config.model.path}: the hub can't be reached; its shape is the one shipped with the package"
        )
    try:
        if unchecked:
            rows = accounts(read_splits(config))
            return rows, [*unchecked, "how long the rows are in tokens: its tokenizer is not there"]
        inputs = read_inputs(config, base)
    except UnreachableError as error:
        return [], [*unchecked, str(error)]
    data = inputs.data
    lines = accounts(data.splits)
    lines.append(
        f"  {'all, for stage 2':<24}{len(data.train.examples):>8,} to train on "
        f"{len(data.calibration_rows.examples):>8,} kept back"
    )
    steps = {axis: steps_of(config.train, len(examples)) for axis, examples in data.injected.items()}
    lines.append(f"  {'optimizer steps':<24}" + ", ".join(f"{axis} {n:,}" for axis, n in steps.items()))
    if inputs.texts:
        trained = steps_of(config.scratch.train, len(inputs.texts))
        lines.append(f"  {'base model':<24}{len(inputs.texts):>8,} texts, {trained:,} steps")
    return lines, []


def accounts(rows: DataSplits) -> list[str]:
    """A line for each side of each expert's rows, and one for every reason why records of it are not used."""
    lines = []
    named = [(f"{name}, {what}", sides[name]) for name in rows.train for what, sides in _sides(rows) if name in sides]
    for name, side in [*named, *((f"set {name}", side) for name, side in rows.sets.items())]:
        if not side.source:
            continue
        questions = sum(not row.response for row in side.rows)
        note = f" ({questions:,} of them without an answer to imitate)" if questions else ""
        lines.append(f"  {name:<24}{len(side.rows):>8,} of {side.records:,} records{note}")
        for reason, count in side.reasons().most_common():
            place = next(d.place for d in side.dropped if d.reason == reason)
            lines.append(f"  {'':<24}{-count:>8,} {reason}, e.g. {place}")
    return lines


def _sides(rows: DataSplits) -> tuple[tuple[str, dict[str, SplitRows]], ...]:
    return (("to train on", rows.train), ("held out", rows.held_out))
