"""`--dry-run`: the resolved config, what will be trained, and an estimate of the memory it takes per rank."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from alignx_ds.config import RunConfig, to_yaml
from alignx_ds.inputs import Inputs
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.specialists.base import BaseModel
from alignx_ds.training.engine import dtype_of

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
    return {
        "base model": sum(p.numel() for p in model.parameters()),
        "trained in stage 1": trained,
        "experts' factors": factors,
        "gates and calibrations": gates * config.gate.latent * len(config.expert_names) + calibrations,
    }


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
    return {"stage 1 (ZeRO-3)": stage1 / 2**30, "stage 2 (ZeRO-2)": stage2 / 2**30}


def describe(config: RunConfig, base: BaseModel, data: Inputs, world_size: int) -> str:
    lines = [to_yaml(config).rstrip(), "", "parameters"]
    lines += [f"  {name:<24}{count:>16,}" for name, count in counts(config, base).items()]
    lines += ["", f"memory per rank, {world_size} ranks, without activations"]
    lines += [f"  {name:<24}{gib:>12.3f} GiB" for name, gib in memory(config, base, world_size).items()]
    lines += ["", "rows"]
    for name in config.axes:
        trained, judged = len(data.injected[name]), len(data.held_out[name])
        lines.append(f"  {name:<24}{trained:>8,} to train on {judged:>8,} held out")
    lines.append(
        f"  {'all, for stage 2':<24}{len(data.train.examples):>8,} to train on "
        f"{len(data.kept_back.examples):>8,} kept back"
    )
    lines += ["", "dry run: everything checked, nothing written"]
    return "\n".join(lines)
