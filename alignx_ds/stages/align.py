"""Stage 2: train gates, calibrators and experts of the mixture under ZeRO-2, then fit the gates' temperatures.

The experts are spread over `align.ep_size` ranks, or all on every rank on the fused path: the result is the same.
Its rows have no system prompt: the aligned model must find the axis by itself.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations import HfDeepSpeedConfig

from alignx_ds.config.parse import substance
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.batches import MicroBatch
from alignx_ds.data.encode import LabelledExamples, pad_token
from alignx_ds.data.inputs import INJECTED
from alignx_ds.experts.task_vectors import read_factors
from alignx_ds.mocae.attention import routed_linears
from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.layer import alignx_layers, freeze_trunk, gates_of
from alignx_ds.mocae.modeling import AlignXConfig, AlignXForCausalLM, Placement
from alignx_ds.mocae.parallel import ParallelMixture
from alignx_ds.models import sharding
from alignx_ds.models import tokenizer as tokenizers
from alignx_ds.models.base import BaseModel, dtype_of
from alignx_ds.models.ends import set_ends
from alignx_ds.routing.curves import router_sums, step_scalars
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.temperature import fit_temperature
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed, memory
from alignx_ds.runtime.deepspeed import load_deepspeed
from alignx_ds.stages.assembly import ExpertFactors, FittedCalibrators, assemble, floors
from alignx_ds.stages.calibrators import fit_calibrators, saved_calibrators
from alignx_ds.stages.stage import Stage, StageContext, ensure, set_up, trained
from alignx_ds.training import engine as engines
from alignx_ds.training import flops
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.loop import StepLoss
from alignx_ds.training.losses import align_terms, forward_nll
from alignx_ds.training.metrics import Losses, MicroBatchLoss


def train_aligned(context: StageContext, specialists: dict[str, Path]) -> Path:
    """The aligned model's directory, made unless it is there; `specialists` are the axes' directories. Collective."""
    fingerprints = {axis: manifest.read(directory)["fingerprint"] for axis, directory in specialists.items()}
    return ensure(stage_of(context, fingerprints), context, partial(_make, context, specialists))


def stage_of(context: StageContext, specialists: dict[str, str]) -> Stage:
    """The stage, with everything that its result depends on; `specialists` are the axes' fingerprints, in their order.

    The layers are in the specialists' fingerprints.
    """
    config, digests = context.config, context.data.digests
    inputs = {
        "base": context.base.digest,
        "specialists": list(specialists.items()),  # the position of an axis is the number of its expert
        "rows": {name: found for name, found in digests.items() if not name.startswith(INJECTED)},
        "align": substance(config.align),
        "gate": asdict(config.gate),
        "floors": floors(config),
        "dtype": config.model.dtype,
        "seed": config.seed,
        "deepspeed": engines.settings_of(config.align.deepspeed, "align.deepspeed"),
    }
    return Stage("alignx", "stage2", context.out.model, inputs)


def _make(context: StageContext, specialists: dict[str, Path], job: TrainingJob) -> dict[str, Any]:
    layers, directory = context.base.layers, context.out.model
    factors = {layer: [read_factors(d, layer) for d in specialists.values()] for layer in layers}
    model, losses = train_mixture(context, factors, job)

    save(model, context.base, directory)
    return {"losses": losses}


def save(model: AlignXForCausalLM, base: BaseModel, directory: Path) -> None:
    """Model and tokenizer, as transformers reads them. Collective."""
    set_ends(model, base.tokenizer)
    if sharding.is_sharded(model):
        sharding.save(model, directory)

    def write() -> None:
        if not sharding.is_sharded(model):
            model.save_pretrained(directory)
        tokenizers.save(base.tokenizer, directory, base.path)

    distributed.on_main(write)


def train_mixture(context: StageContext, factors: ExpertFactors, job: TrainingJob) -> tuple[AlignXForCausalLM, Losses]:
    """(trained model with fitted temperatures, all experts on this rank; loss of every step). Collective."""
    c, base = context.config, context.base
    if job.checkpoints:
        path, inputs = job.checkpoints.directory / "calibrators", job.checkpoints.inputs
        fitted, hashes = saved_calibrators(context, factors, path, inputs)
        job = replace(job, checkpoints=replace(job.checkpoints, inputs=inputs | {"calibrators": hashes}))
    else:
        fitted = fit_calibrators(context, factors)
    weights, losses = _train_spread(context, factors, fitted, job)
    memory.free()  # before the model is assembled once more
    fused = assemble(c, base, factors, fitted, None)
    # Without what is spread over the ranks: the trunk, which is not trained.
    parameters = {name for name, p in fused.named_parameters() if not isinstance(p, DTensor)}
    fused.load_state_dict({name: t for name, t in weights.items() if name in parameters}, strict=False)
    fused.to(distributed.device()).eval()
    fit_temperatures(fused, context.data.calibration_rows, pad_token(base.tokenizer), c.evaluation.batch)
    return fused, losses


def _train_spread(
    context: StageContext, factors: ExpertFactors, fitted: FittedCalibrators, job: TrainingJob
) -> tuple[dict[str, Tensor], Losses]:
    """(state of the trained mixture on the fused path, on the CPU; loss of every step). Collective.

    The state leaves out what ZeRO-3 has sharded of the frozen trunk.
    """
    c, rows = context.config, context.data.train
    setup = set_up(context, c.align, "align", c.align.steps, rows)
    zero3 = HfDeepSpeedConfig(setup.deepspeed)  # while it is alive, ZeRO-3 shards the base model as it is loaded
    model = assemble(c, context.base, factors, fitted, placement(c.align.ep_size)).to(distributed.device())
    mix_outputs(model)
    freeze_trunk(model, experts=c.align.expert_lr_scale > 0)
    make_expert_groups(c.align.ep_size)
    groups = parameter_groups(model, c)
    job = replace(job, scalars=partial(step_scalars, c.expert_names))
    needed = _flops(c, model.config, rows.learned_share)
    with trained(context, setup, model, groups, rows, step_loss(c), job, title="align", flops=needed) as (made, losses):
        weights = whole_state(made)
        made.forget_forward_pass()
    del zero3
    return weights, losses


def _flops(c: RunConfig, model: AlignXConfig, learned: float) -> float:
    """Of a token, without what experts add to the attention: in training it goes through every expert."""
    rank, fused = max(model.ranks.values(), default=0), c.align.ep_size == 0
    how: Any = {"fused": fused, "factors_trained": c.align.expert_lr_scale > 0, "learned": learned}
    return flops.mixture(model.text_config, model.layers, len(c.expert_names), rank, **how)


def placement(ep_size: int) -> Placement | None:
    """Of this rank's experts; None, and so the fused path, where `ep_size` is 0."""
    return Placement(ep_size, distributed.rank() % ep_size) if ep_size else None


def mix_outputs(model: AlignXForCausalLM) -> None:
    """Let fused mixtures mix the experts' outputs, as expert parallelism does, whatever `gate.combine` serves with."""
    for layer in alignx_layers(model):
        if isinstance(layer.mixture, FusedMixture):
            layer.mixture.merge = False


def make_expert_groups(ep_size: int) -> None:
    """Make DeepSpeed's process groups of experts, unless `ep_size` is 0.

    It makes missing ones itself, but announces that from every rank.
    """
    groups = load_deepspeed().utils.groups
    if ep_size and f"ep_size_{ep_size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """The optimizer's groups. Experts have their own: another learning rate, and no weight decay.

    DeepSpeed reduces those of the expert-parallel path apart. On the fused path they are parameters like any other.
    """
    moe, hosts = load_deepspeed().moe.utils, (FusedMixture, ParallelMixture)
    mixtures = [m for m in model.modules() if isinstance(m, hosts)]
    experts = {id(p) for mixture in mixtures for p in mixture.parameters()}
    experts |= {id(p) for module in routed_linears(model) for p in module.trained()}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    dense = engines.decay_groups([(n, p) for n, p in named if id(p) not in experts], config.align.weight_decay)
    expert = {
        "params": [p for _, p in named if id(p) in experts],
        "lr": config.align.lr * config.align.expert_lr_scale,
        "weight_decay": 0.0,
        "name": "experts",
    }
    if config.align.ep_size == 0:
        return [group for group in [*dense, expert] if group["params"]]
    if not expert["params"]:
        expert["params"] = [_stand_in(model, config)]
    groups: list[dict[str, Any]] = moe.split_params_into_different_moe_groups_for_optimizer([*dense, expert])
    return [group for group in groups if group["params"]]


def _stand_in(model: nn.Module, config: RunConfig) -> nn.Parameter:
    """One number that nothing uses, added to the model. DeepSpeed requires an expert's parameter of every MoE model."""
    made = nn.Parameter(torch.zeros(1, device=distributed.device(), dtype=dtype_of(config.model.dtype)))
    marks: Any = made
    marks.allreduce, marks.group_name = False, f"ep_size_{config.align.ep_size}"
    model.register_parameter("stand_in", made)
    return made


def step_loss(config: RunConfig) -> StepLoss:
    """Stage 2's weighted loss of one micro batch, with its terms and the router's sums."""

    def loss(engine: Any, part: MicroBatch) -> MicroBatchLoss:
        b = part.batch
        masks = {"attention_mask": b.attention_mask, "prompt_mask": b.prompt_mask}
        nll = forward_nll(engine, b, input_ids=b.input_ids, use_cache=False, **masks)
        terms = align_terms(engine.module, nll, part.needs, part.lm_scale, part.gate_weights)
        return MicroBatchLoss(terms.total(config.align), terms.scalars(), router_sums(engine.module, part))

    return loss


def whole_state(model: AlignXForCausalLM) -> dict[str, Tensor]:
    """The state that the model has on the fused path, on the CPU, without what ZeRO-3 has sharded of the trunk.

    Collective.
    """
    parts = [part for layer in alignx_layers(model) for part in (layer.mixture, layer.calibration, layer.gate)]
    own = [p for part in parts if part is not None for p in part.parameters()]
    own += [p for module in routed_linears(model) for p in module.trained()]
    with load_deepspeed().zero.GatheredParameters(own):
        state = {name: t.detach().to("cpu", copy=True) for name, t in model.fused_state().items()}
    return {name: t for name, t in state.items() if t.numel()}


def fit_temperatures(model: AlignXForCausalLM, rows: LabelledExamples, pad_id: int, batch: int) -> None:
    """Fit each gate's post-hoc temperature, in place, on the calibration split. Collective."""
    labels = rows.multi_hot(len(model.config.experts))
    terms = gate_terms(model, rows, pad_id, batch)
    for index, gate in gates_of(model).items():
        gate.calibration_temperature.fill_(
            fit_temperature(sum_of(terms[index]), labels, gate.settings.kind, rows.weights())
        )
