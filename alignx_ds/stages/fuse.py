"""H3Fusion and TrinityX: start from the specialists' FFNs, fine-tune on the same rows as stage 2, leave a directory.

Stage 2's own loop, engine and rows; the mixtures, their losses and what is trained are the baselines'.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignx_ds.baselines.fusion import H3FUSION, TRINITYX, FullExperts, FusionSettings, fusion_layers, replace_ffns
from alignx_ds.baselines.fusion_losses import Drift, fusion_terms
from alignx_ds.config.parse import substance, to_dict
from alignx_ds.config.schema import FUSIONS, FusionConfig, RunConfig
from alignx_ds.data.batches import MicroBatch
from alignx_ds.data.encode import LabelledExamples, pad_token
from alignx_ds.experts.task_vectors import Changes, read_task_vector
from alignx_ds.mocae.experts import PROJECTIONS, FeedForward
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed
from alignx_ds.stages.context import StageContext
from alignx_ds.training import engine as engines
from alignx_ds.training.keeper import Keeper, KeeperOf
from alignx_ds.training.loop import StepLoss, micro_batches, train
from alignx_ds.training.losses import answer_nll

SETTINGS: dict[str, FusionSettings] = {"h3fusion": H3FUSION, "trinityx": TRINITYX}
WEIGHTS = "mixtures.safetensors"  # the backbone's own weights are not saved again


@dataclass(frozen=True)
class FusionJob:
    """One of the two by its name; `specialists` are the axes' directories, in the order of the experts."""

    name: str
    config: RunConfig
    base: BaseModel
    specialists: list[Path]
    rows: LabelledExamples  # un-injected, of all axes and the generalist, as in stage 2
    digests: dict[str, str]  # of the rows, by expert
    directory: Path

    @property
    def stage(self) -> FusionConfig:
        stage: FusionConfig = getattr(self.config.baselines, self.name)
        return stage

    def inputs(self) -> dict[str, Any]:
        """Everything that the result depends on; the base and its layers come in through the specialists."""
        settings = to_dict(self.config)
        return {
            "specialists": [manifest.read(directory)["fingerprint"] for directory in self.specialists],
            "rows": self.digests,
            "mixture": asdict(SETTINGS[self.name]),
            "stage": substance(self.stage),
            "deepspeed": engines.settings_of(self.stage.deepspeed, f"baselines.{self.name}.deepspeed"),
            **{key: settings[key] for key in ("data", "model", "seed")},
        }


def fusions(context: StageContext, specialists: dict[str, Path]) -> dict[str, Path]:
    """Those fusions that the recipe asks for; their directories. Collective."""
    directories = {name: context.out.baselines / name for name in FUSIONS if name in context.config.baselines.make}
    for name, directory in directories.items():
        data, of = context.data, list(specialists.values())
        job = FusionJob(name, context.config, context.base, of, data.train, data.digests, directory)
        ensure(job, context.keeper)
    return directories


def ensure(job: FusionJob, keep: KeeperOf) -> None:
    """Train the mixture unless a current one is there. Collective."""
    inputs = job.inputs()
    keeper = keep(f"baselines/{job.name}", inputs)
    if distributed.on_main(lambda: manifest.is_current(job.directory, inputs)):
        console.say(f"{job.name}: unchanged, reused from {job.directory}")
    else:
        model, losses = _train(job, keeper)

        def save() -> None:
            shutil.rmtree(job.directory, ignore_errors=True)
            job.directory.mkdir(parents=True)
            save_file(_mixtures(model, job.base), job.directory / WEIGHTS)
            manifest.write(job.directory, inputs, {"losses": losses})

        distributed.on_main(save)
    keeper.finish()


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


def _train(job: FusionJob, keeper: Keeper) -> tuple[nn.Module, list[float | None]]:
    config, stage = job.config, job.stage
    torch.manual_seed(config.seed)  # the gates' first weights, the same on every rank
    model = assemble(job.base, job.specialists, SETTINGS[job.name])
    freeze_trunk(model, stage)
    model.to(distributed.device())
    plan = engines.Plan.of(stage, config.model.dtype, stage.steps)
    template = engines.read_template(stage.deepspeed, f"baselines.{job.name}.deepspeed")
    filled = engines.fill(template, plan, distributed.world_size())
    engine = engines.start(model, parameter_groups(model, stage), filled, plan)
    batches = partial(micro_batches, job.rows, plan, pad_token(job.base.tokenizer), config.seed)
    with console.progress(f"fuse {job.name}", plan.steps) as bar:
        losses = train(engine, batches, step_loss(engine.module, stage), plan, bar, keeper)
    trained = engine.module
    engine.destroy()
    return trained, losses


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


def step_loss(model: nn.Module, stage: FusionConfig) -> StepLoss:
    start = Drift(model) if stage.drift > 0 and stage.expert_lr_scale > 0 else None  # a copy of every expert
    layers = fusion_layers(model)

    def loss(engine: Any, part: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        b = part.batch
        output = engine(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False)
        lm = answer_nll(output.logits, b.labels) * part.lm_scale
        drift = start.of(engine.module) if start else lm.new_zeros(())
        axes = part.experts - 1  # no copy for the generalist, expert 0
        terms = fusion_terms(layers, lm, drift, b.attention_mask, axes)
        return terms.total(stage), terms.scalars()

    return loss
