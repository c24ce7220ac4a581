"""`--dry-run`: the resolved config, what will be trained, and an estimate of the memory it takes per rank."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from alignx_ds.config import FUSIONS, SCRATCH_MODEL, RunConfig, to_yaml
from alignx_ds.errors import UnreachableError
from alignx_ds.inputs import Material, RowSet, Side, read_rows
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.specialists.base import BaseModel
from alignx_ds.training.engine import dtype_of, steps_of

ADAM_STATES = 2  # first and second moment, fp32


def counts(config: RunConfig, base: BaseModel) -> dict[str, int]:
    """Parameters: of the base, of what stage 1 trains, of the experts' factors, and of what else stage 2 trains."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config)
    trained = factors = 0
    for layer in base.layers:
        ffn = base.table.view(base.table.ffn_of(model, layer))
        for p in PROJECTIONS:
            m, n = ffn.projection(p).weight.shape
            rank = min(m, n, config.experts.rank or min(m, n))
            trained += m * n
            factors += rank * (m + n) * len(config.expert_names)
    gates = 1 if config.gate.scope == "shared" else len(base.layers)
    calibrations = len(base.layers) * (base.config.hidden_size * config.gate.output_latent + 2)
    copies = {"full copies of the FFNs": trained * len(config.axes)} if _fuses(config) else {}
    return {
        "base model": sum(p.numel() for p in model.parameters()),
        "trained in stage 1": trained,
        "experts' factors": factors,
        "gates and calibrations": gates * config.gate.latent * len(config.expert_names) + calibrations,
        **copies,
    }


def _fuses(config: RunConfig) -> bool:
    return any(name in config.baselines.make for name in FUSIONS)


def memory(config: RunConfig, base: BaseModel, world_size: int) -> dict[str, float]:
    """GiB per rank for weights, gradients and optimizer; activations come on top."""
    n = counts(config, base)
    size = torch.empty((), dtype=dtype_of(config.model.dtype)).element_size()
    master = 0 if size == 4 else 4
    states = 4 * ADAM_STATES + master
    stage1 = (n["base model"] * size + n["trained in stage 1"] * (size + states)) / world_size
    placed = n["experts' factors"] / config.align.ep_size
    data_parallel = world_size // config.align.ep_size
    dense = n["gates and calibrations"]
    stage2 = (
        n["base model"] * size + placed * (2 * size + states / data_parallel) + dense * (2 * size + states / world_size)
    )
    total = {"stage 1 (ZeRO-3)": stage1, "stage 2 (ZeRO-2)": stage2}
    if _fuses(config):
        copies = n["full copies of the FFNs"]
        rest = n["base model"] - n["trained in stage 1"]
        drift = any(getattr(config.baselines, name).drift for name in FUSIONS if name in config.baselines.make)
        moved = copies * (2 * size + states / world_size) + (copies * size if drift else 0)
        total["H3Fusion, TrinityX (ZeRO-2)"] = rest * size + moved
    return {name: size / 2**30 for name, size in total.items()}


def describe(config: RunConfig, base: BaseModel, world_size: int) -> str:
    """The plan. What the hub would have to tell, and can't now, is named."""
    lines = [to_yaml(config).rstrip(), "", "parameters"]
    lines += [f"  {name:<24}{count:>16,}" for name, count in counts(config, base).items()]
    lines += ["", f"memory per rank, {world_size} ranks, without activations"]
    lines += [f"  {name:<28}{gib:>12.3f} GiB" for name, gib in memory(config, base, world_size).items()]
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
            rows = accounts(read_rows(config))
            return rows, [*unchecked, "how long the rows are in tokens: its tokenizer is not there"]
        material = Material.of(config, base)
    except UnreachableError as error:
        return [], [*unchecked, str(error)]
    data = material.data
    lines = accounts(data.rows)
    lines.append(
        f"  {'all, for stage 2':<24}{len(data.train.examples):>8,} to train on "
        f"{len(data.kept_back.examples):>8,} kept back"
    )
    steps = {axis: steps_of(config.train, len(examples)) for axis, examples in data.injected.items()}
    lines.append(f"  {'optimizer steps':<24}" + ", ".join(f"{axis} {n:,}" for axis, n in steps.items()))
    if material.texts:
        trained = steps_of(config.scratch.train, len(material.texts))
        lines.append(f"  {'base model':<24}{len(material.texts):>8,} texts, {trained:,} steps")
    return lines, []


def accounts(rows: RowSet) -> list[str]:
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


def _sides(rows: RowSet) -> tuple[tuple[str, dict[str, Side]], ...]:
    return (("to train on", rows.train), ("held out", rows.held_out))
