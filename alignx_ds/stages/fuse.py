"""Train H3Fusion and TrinityX: they start from the specialists' FFNs and see the same rows as stage 2.

Their gating loss learns from the same labels as AlignX's gate, with the same weights, and from routing rows too.

The mixtures themselves and their losses are in baselines/.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignx_ds.baselines.fusion import H3FUSION, TRINITYX, FullExperts, FusionSettings, fusion_layers, replace_ffns
from alignx_ds.baselines.fusion_losses import Drift, fusion_terms
from alignx_ds.config.parse import substance
from alignx_ds.config.schema import FUSIONS, FusionConfig, RunConfig
from alignx_ds.data.batches import MicroBatch
from alignx_ds.experts.task_vectors import Changes, read_task_vector
from alignx_ds.mocae.experts import PROJECTIONS, FeedForward
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed
from alignx_ds.stages.stage import Stage, StageContext, ensure, set_up, trained
from alignx_ds.training import engine as engines
from alignx_ds.training import flops
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.loop import StepLoss
from alignx_ds.training.losses import forward_nll
from alignx_ds.training.metrics import MicroBatchLoss

SETTINGS: dict[str, FusionSettings] = {"h3fusion": H3FUSION, "trinityx": TRINITYX}
WEIGHTS = "mixtures.safetensors"  # the backbone's own weights are not saved again


def train_fusions(context: StageContext, specialists: dict[str, Path]) -> dict[str, Path]:
    """By name, the directories of those fusions that the recipe lists. Collective."""
    names = [name for name in FUSIONS if name in context.config.baselines.make]
    return {name: train_fusion(context, name, list(specialists.values())) for name in names}


def train_fusion(context: StageContext, name: str, specialists: list[Path]) -> Path:
    """The fusion's directory, made unless it is there; `specialists` in the order of the experts. Collective."""
    stage = stage_of(context, name, [manifest.read(directory)["fingerprint"] for directory in specialists])
    return ensure(stage, context, partial(_train, context, name, specialists))


def stage_of(context: StageContext, name: str, specialists: list[str]) -> Stage:
    """The fusion's stage, with everything that its result depends on; `specialists` are fingerprints.

    The base model and its layers are in the specialists' fingerprints.
    """
    config = settings_of(context.config, name)
    inputs = {
        "specialists": specialists,
        "rows": context.data.digests["train"],
        "mixture": asdict(SETTINGS[name]),
        "stage": substance(config),
        "dtype": context.config.model.dtype,
        "seed": context.config.seed,
        "deepspeed": engines.settings_of(config.deepspeed, f"baselines.{name}.deepspeed"),
    }
    return Stage(name, f"baselines/{name}", context.out.baselines / name, inputs)


def settings_of(config: RunConfig, name: str) -> FusionConfig:
    """The recipe's section of this fusion."""
    found: FusionConfig = getattr(config.baselines, name)
    return found


def load(name: str, base: BaseModel, directory: Path) -> PreTrainedModel:
    """The backbone with the trained mixtures in place of its FFNs."""
    saved = load_file(directory / WEIGHTS)
    gate = next(tensor for key, tensor in saved.items() if key.endswith(".gate.weight"))
    model = load_backbone(base)
    replace_ffns(model, base.table, base.layers, lambda _, ffn: FullExperts([ffn] * len(gate), SETTINGS[name]))
    expected = _mixtures(model, base)
    assert saved.keys() == expected.keys(), "the directory was made for this base and these layers"
    for key, tensor in saved.items():
        expected[key].copy_(tensor)
    return model


def _mixtures(model: nn.Module, base: BaseModel) -> dict[str, Tensor]:
    """By layer and name, the mixtures' own tensors."""
    layers = zip(base.layers, fusion_layers(model), strict=True)
    return {f"{layer}.{key}": t.detach() for layer, block in layers for key, t in block.state_dict().items()}


def assemble(base: BaseModel, specialists: list[Path], settings: FusionSettings) -> PreTrainedModel:
    """The backbone with one full FFN per specialist; layer by layer, so that no specialist is in memory as a whole."""
    model = load_backbone(base)

    def make(layer: int, ffn: FeedForward) -> FullExperts:
        return FullExperts([_specialist(ffn, read_task_vector(d, layer)) for d in specialists], settings)

    replace_ffns(model, base.table, base.layers, make)
    return model


@torch.no_grad()
def _specialist(ffn: FeedForward, change: Changes) -> FeedForward:
    """θ₀ + τ of one layer, with weights of its own."""
    projections = {}
    for p in PROJECTIONS:
        shared = ffn.projection(p)
        own = nn.Linear(shared.in_features, shared.out_features, bias=shared.bias is not None, dtype=ffn.dtype)
        own.weight.copy_(shared.weight + change[p].to(shared.weight))
        if shared.bias is not None:
            own.bias.copy_(shared.bias)
        projections[p] = own
    return FeedForward(**projections, activation=ffn.activation)


def _train(context: StageContext, name: str, specialists: list[Path], job: TrainingJob) -> dict[str, Any]:
    config, base = settings_of(context.config, name), context.base
    torch.manual_seed(context.config.seed)  # the gates' first weights, the same on every rank
    model = assemble(base, specialists, SETTINGS[name])
    freeze_trunk(model, config)
    model.to(distributed.device())
    rows = context.data.train
    setup = set_up(context, config, f"baselines.{name}", config.steps, rows)
    groups, loss = parameter_groups(model, config), step_loss(model, config, list(context.config.axes))
    used = min(SETTINGS[name].top_k, len(specialists)) or len(specialists)
    how: Any = {"experts_trained": config.expert_lr_scale > 0, "learned": rows.learned_share}
    needed = flops.fusion(base.config, base.layers, used, **how)
    with trained(context, setup, model, groups, rows, loss, job, title=f"fuse {name}", flops=needed) as (made, losses):
        weights = context.out.baselines / name / WEIGHTS
        distributed.on_main(lambda: save_file(_mixtures(made, base), weights))
    return {"losses": losses}


def freeze_trunk(model: nn.Module, stage: FusionConfig) -> None:
    """Leave the gates, γ and, unless they keep what stage 1 made, the experts' weights; as in stage 1, no biases."""
    model.requires_grad_(False)
    for block in fusion_layers(model):
        block.requires_grad_(True)
        block.biases.requires_grad_(False)
        block.weights.requires_grad_(stage.expert_lr_scale > 0)


def parameter_groups(model: nn.Module, stage: FusionConfig) -> list[dict[str, Any]]:
    """Experts apart, at their own learning rate."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    expert = [(n, p) for n, p in named if ".weights." in n]
    rest = [(n, p) for n, p in named if ".weights." not in n]
    lr = stage.lr * stage.expert_lr_scale
    experts = [group | {"lr": lr, "name": "experts"} for group in engines.decay_groups(expert, stage.weight_decay)]
    return [*engines.decay_groups(rest, stage.weight_decay), *experts]


def step_loss(model: nn.Module, stage: FusionConfig, experts: list[str]) -> StepLoss:
    """The fusion's weighted loss of one micro batch and its terms; drift is measured from the weights of now.

    `experts` are their axes, in order.
    """
    scales = [stage.drift_scale.get(axis, 1.0) for axis in experts] if stage.drift_scale else None
    start = Drift(model, scales) if stage.drift > 0 and stage.expert_lr_scale > 0 else None  # a copy of every expert
    layers = fusion_layers(model)

    def loss(engine: Any, part: MicroBatch) -> MicroBatchLoss:
        b = part.batch
        nll = forward_nll(engine, b, input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False)
        lm = nll * part.lm_scale
        drift = start.of(engine.module) if start else lm.new_zeros(())
        axes = part.needs[:, 1:]  # no copy for the generalist, expert 0
        terms = fusion_terms(layers, lm, drift, b.attention_mask, axes, part.gate_weights)
        return MicroBatchLoss(terms.total(stage), terms.scalars())

    return loss
