"""How large a run will be: parameters, memory per rank, and disk space."""

from __future__ import annotations

from alignx_ds.config.schema import FUSIONS, RunConfig
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.models.base import BaseModel
from alignx_ds.training import engine as engines

ADAM_STATES = 2  # first and second moment, fp32


def counts(config: RunConfig, base: BaseModel) -> dict[str, int]:
    """Parameters: of the base, of what stage 1 trains, of the experts' factors, and of what else stage 2 trains."""
    model = base.skeleton
    trained = factors = 0
    for layer in base.layers:
        ffn = base.table.view(base.table.ffn_of(model, layer))
        for p in PROJECTIONS:
            m, n = ffn.projection(p).weight.shape
            rank = min(m, n, config.experts.rank or min(m, n))
            trained += m * n
            factors += rank * (m + n) * len(config.expert_names)
    gates = 1 if config.gate.scope == "shared" else len(base.layers)
    latent = config.gate.output_latent
    calibrations = len(base.layers) * (base.config.hidden_size * latent + 2) if latent else 0
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
    """GiB per rank for weights, gradients and optimizer states, without activations."""
    n = counts(config, base)
    size = base.dtype.itemsize
    master = 0 if size == 4 else 4
    states = 4 * ADAM_STATES + master
    stage1 = (n["base model"] * size + n["trained in stage 1"] * (size + states)) / world_size
    stage = engines.read_template(config.align.deepspeed, "align.deepspeed").get("zero_optimization", {})
    zero = max(1, int(stage.get("stage", 0)))
    placed, data_parallel = _experts_on_a_rank(n["experts' factors"], config, world_size)
    trained = placed if config.align.expert_lr_scale > 0 else 0
    dense = n["gates and calibrations"]
    stage2 = (
        (n["base model"] + placed) * size / (world_size if zero == 3 else 1)
        + trained * (size + states / data_parallel)
        + dense * (2 * size + states / world_size)
    )
    total = {"stage 1 (ZeRO-3)": stage1, f"stage 2 (ZeRO-{zero})": stage2}
    if _fuses(config):
        copies = n["full copies of the FFNs"]
        rest = n["base model"] - n["trained in stage 1"]
        drift = any(getattr(config.baselines, name).drift for name in FUSIONS if name in config.baselines.make)
        moved = copies * (2 * size + states / world_size) + (copies * size if drift else 0)
        total["H3Fusion, TrinityX (ZeRO-2)"] = rest * size + moved
    return {name: size / 2**30 for name, size in total.items()}


def _experts_on_a_rank(factors: float, config: RunConfig, world_size: int) -> tuple[float, int]:
    """(numbers in their factors, ranks over which the optimizer's states of these are spread)."""
    experts, ep_size = len(config.expert_names), config.align.ep_size
    if ep_size == 0:  # the fused path stores no factors for the generalist
        return factors * (experts - 1) / experts, world_size
    return factors / ep_size, world_size // ep_size


def disk(config: RunConfig, base: BaseModel) -> dict[str, float]:
    """GiB that the run's directory takes at most: the results, and the checkpoints of the job that runs.

    A checkpoint holds weights and optimizer states in fp32. One is written while the newest and the best are kept.
    """
    n, axes = counts(config, base), len(config.axes)
    whole = 4 * (1 + ADAM_STATES)
    jobs = {
        "stage 1": n["trained in stage 1"],
        "stage 2": n["gates and calibrations"] + (n["experts' factors"] if config.align.expert_lr_scale > 0 else 0),
        "fusions": n.get("full copies of the FFNs", 0),
    }
    fine_tunes = axes + max(0, axes - 1) + 1  # specialists, the sequence after the first of them, and mixed
    fusions = sum(name in config.baselines.make for name in FUSIONS)
    aligned = n["base model"] + n["experts' factors"] + n["gates and calibrations"]
    kept = 4 * (fine_tunes * jobs["stage 1"] + fusions * jobs["fusions"] + aligned)
    at_a_time = config.checkpoints.keep + 2
    checkpoints = whole * at_a_time * (sum(jobs.values()) if config.checkpoints.finished else max(jobs.values()))
    return {"results": kept / 2**30, f"checkpoints, {at_a_time} at a time": checkpoints / 2**30}
