"""How large a run will be: parameters, memory per rank, and disk space."""

from __future__ import annotations

import torch

from alignx_ds.config.schema import FUSIONS, REGULARISED, RESTORED, RunConfig
from alignx_ds.experts.lora import Lora
from alignx_ds.mocae.experts import ATTENTION
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.lexical import Lexicon
from alignx_ds.mocae.output_calibration import OutputCalibration
from alignx_ds.mocae.routing_state import SUMMARIES
from alignx_ds.models.base import BaseModel

ADAM_STATES = 2  # first and second moment, fp32


def counts(config: RunConfig, base: BaseModel) -> dict[str, int]:
    """Parameters: of the base, of what stage 1 trains, of the experts' factors, and of what else stage 2 trains."""
    model = base.skeleton
    lora = Lora.of(config) if config.train.trainable == "lora" else None
    ffns = factors = 0
    for layer in base.layers:
        for p in base.table.projections:
            m, n = base.table.linear(model, layer, p).weight.shape
            rank = min(m, n, config.experts.rank or min(m, n)) if lora is None else lora.rank_of(p)
            ffns += m * n
            factors += rank * (m + n) * len(config.expert_names)
    if lora is not None:
        for layer, p in lora.trained_in(base.layers):
            if p in ATTENTION:
                factors += lora.rank * sum(base.table.linear(model, layer, p).weight.shape) * len(config.axes)
    gates = 1 if config.gate.scope == "shared" else len(base.layers)
    latent = config.gate.output_latent
    calibrations = len(base.layers) * (base.config.hidden_size * latent + 2) if latent else 0
    whole = sum(p.numel() for p in model.parameters())
    trained = whole if config.trains_all("train") else ffns if lora is None else lora.numbers(base)
    copies = {"full copies of the FFNs": ffns * len(config.axes)} if _fuses(config) else {}
    return {
        "base model": whole,
        "trained in stage 1": trained,
        "experts' factors": factors,
        "gates and calibrations": gates * (config.gate.latent + 1) * len(config.expert_names) + calibrations,
        **copies,
    }


def _fuses(config: RunConfig) -> bool:
    return any(name in config.baselines.make for name in FUSIONS)


def buffers(config: RunConfig, base: BaseModel) -> int:
    """Numbers in the aligned model's buffers: the calibrators' geometries and the lexicon."""
    gate, experts, d = config.gate, len(config.expert_names), base.config.hidden_size

    def geometry(size: int, latent: int) -> Geometry:
        return Geometry.blank(size, latent, gate.fractal_dimensions, experts, gate.anchors, gate.scales)

    with torch.device("meta"):
        of_gate = sum(t.numel() for t in geometry(SUMMARIES * d, gate.latent).tensors().values()) + 1  # temperature
        output = list(OutputCalibration(geometry(d, gate.output_latent), 0, 0).buffers()) if gate.output_latent else []
        lexicon = list(Lexicon(experts).buffers())
    gates = 1 if gate.scope == "shared" else len(base.layers)
    of_layers = len(base.layers) * sum(b.numel() for b in output)
    return gates * of_gate + of_layers + sum(b.numel() for b in lexicon)


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
    make, sequence = config.baselines.make, max(0, axes - 1)  # of fine-tunes, after the first specialist
    fine_tunes = axes + sequence * (2 if REGULARISED in make else 1) + 1 + (RESTORED in make)  # 1: mixed
    fusions = sum(name in make for name in FUSIONS)
    aligned = n["base model"] + n["experts' factors"] + n["gates and calibrations"]
    kept = 4 * (fine_tunes * jobs["stage 1"] + fusions * jobs["fusions"] + aligned)
    at_a_time = config.checkpoints.keep + 2
    checkpoints = whole * at_a_time * (sum(jobs.values()) if config.checkpoints.finished else max(jobs.values()))
    return {"results": kept / 2**30, f"checkpoints, {at_a_time} at a time": checkpoints / 2**30}
