"""Stage 2: assemble the mixture from the specialists, train gate, calibrations and experts under ZeRO-2, calibrate.

Rows are un-injected: the aligned model must find the axis by itself.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignx_ds.config.parse import substance, to_dict
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.batches import MicroBatch
from alignx_ds.data.encode import LabelledExamples, pad_token
from alignx_ds.errors import DataError
from alignx_ds.experts.task_vectors import read_factors
from alignx_ds.mocae.experts import PROJECTIONS, Factors, align_ranks
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.layer import freeze_trunk, gates_of
from alignx_ds.mocae.modeling import AlignXConfig, AlignXForCausalLM, LayerParts, Placement
from alignx_ds.mocae.routing_state import SUMMARIES
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.routing.curves import RouterCurves, router_sums
from alignx_ds.routing.fit_geometry import collect, fit
from alignx_ds.routing.fit_lexicon import fit_lexicon
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.temperature import fit_temperature
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed
from alignx_ds.runtime.deepspeed import load_deepspeed
from alignx_ds.stages.context import StageContext
from alignx_ds.training import engine as engines
from alignx_ds.training.keeper import KeeperOf
from alignx_ds.training.loop import StepLoss, micro_batches, train
from alignx_ds.training.losses import align_terms


@dataclass(frozen=True)
class AlignJob:
    """What stage 2 works on: the experts' factors by layer (by global id, without the generalist) and the rows."""

    config: RunConfig
    base: BaseModel
    factors: dict[int, list[Factors]]
    rows: LabelledExamples  # un-injected training rows of all axes and the generalist
    calibration_rows: LabelledExamples  # the calibration split: fits the calibrators' constants and the temperature


@dataclass(frozen=True)
class Fitted:
    """What the rows fix before training: the gates' and the outputs' geometries by layer, and the lexicon's state."""

    gates: dict[int, Geometry]
    outputs: dict[int, Geometry]
    words: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """By "kind.layer.name"; what `of` reads."""
        found = {f"words.{name}": tensor.contiguous() for name, tensor in self.words.items()}
        for kind in ("gates", "outputs"):
            for layer, geometry in getattr(self, kind).items():
                found |= geometry.tensors(f"{kind}.{layer}.")
        return found

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Fitted:
        def geometries(kind: str) -> dict[int, Geometry]:
            layers = {int(name.split(".")[1]) for name in tensors if name.startswith(f"{kind}.")}
            return {layer: Geometry.from_tensors(tensors, f"{kind}.{layer}.") for layer in sorted(layers)}

        words = {name.removeprefix("words."): t for name, t in tensors.items() if name.startswith("words.")}
        return cls(geometries("gates"), geometries("outputs"), words)


def ensure(context: StageContext, specialists: dict[str, Path]) -> Path:
    """The aligned model's directory: made, unless one is there of just these specialists and settings. Collective."""
    config, base, data, directory = context.config, context.base, context.data, context.out.model
    settings = to_dict(config)
    inputs = {
        "specialists": {axis: manifest.read(d)["fingerprint"] for axis, d in specialists.items()},
        "generalist": data.digests["generalist"],
        "align": substance(config.align),
        **{key: settings[key] for key in ("gate", "data", "model", "seed")},
        "deepspeed": engines.settings_of(config.align.deepspeed, "align.deepspeed"),
    }
    if distributed.on_main(lambda: manifest.is_current(directory, inputs)):
        console.say(f"alignx: unchanged, reused from {directory}")
    else:
        factors = {layer: [read_factors(d, layer) for d in specialists.values()] for layer in base.layers}
        job = AlignJob(config, base, factors, data.train, data.calibration_rows)
        model, losses = align(job, context.keeper, inputs)

        def save() -> None:
            shutil.rmtree(directory, ignore_errors=True)
            model.save_pretrained(directory)
            base.tokenizer.save_pretrained(directory)
            manifest.write(directory, inputs, {"losses": losses})

        distributed.on_main(save)
    context.keeper("stage2", inputs).finish()
    return directory


def model_config(job: AlignJob) -> AlignXConfig:
    c = job.config
    ranks = {p: max(f.rank(p) for fs in job.factors.values() for f in fs) for p in PROJECTIONS}
    return AlignXConfig(
        text_config=job.base.config,
        experts=c.expert_names,
        layers=job.base.layers,
        ranks=ranks,
        gate=c.gate,
    )


def assemble(job: AlignJob, fitted: Fitted | None, placement: Placement | None) -> AlignXForCausalLM:
    """The aligned model: fused, or with its experts placed over ranks; with nothing fitted its gates know nothing."""
    config, backbone = model_config(job), load_backbone(job.base)
    parts = {}
    for layer in job.base.layers:
        ffn = job.base.table.view(job.base.table.ffn_of(backbone, layer))
        experts = align_ranks([Factors.zeros(ffn, config.ranks), *job.factors[layer]])
        gate_here = config.gate_layer(layer) == layer
        if fitted is None:
            hidden = config.text_config.hidden_size
            gate = _blank(job.config, SUMMARIES * hidden, job.config.gate.latent)
            output = _blank(job.config, hidden, job.config.gate.output_latent)
        else:
            gate, output = fitted.gates[config.gate_layer(layer)], fitted.outputs[layer]
        parts[layer] = LayerParts(experts, gate if gate_here else None, output)
    model = AlignXForCausalLM(config, backbone=backbone, parts=parts, placement=placement)
    if fitted is not None:
        model.lexicon.load_state_dict(fitted.words)
    return model


def _blank(c: RunConfig, d: int, latent: int) -> Geometry:
    return Geometry.blank(d, latent, c.gate.fractal_dimensions, len(c.expert_names), c.gate.anchors, c.gate.scales)


def fit_calibrators(job: AlignJob) -> Fitted:
    """Fitted once on rank 0 and shared. Collective."""
    model = assemble(job, None, None).to(distributed.device())
    c, pad_id = job.config, pad_token(job.base.tokenizer)
    rows = first_of_each(job.rows, c.gate.rows)
    seen = collect(model, rows, pad_id, c.evaluation.batch)
    unseen = collect(model, job.calibration_rows, pad_id, c.evaluation.batch)

    def geometries(kind: int, latent: int) -> dict[int, Geometry]:
        return {
            layer: fit(features, unseen[kind][layer], latent, c.gate, c.expert_names, c.seed)
            for layer, features in seen[kind].items()
        }

    fitted = Fitted({}, {}, {})
    if distributed.is_main():
        words = fit_lexicon(rows, job.calibration_rows, len(c.expert_names))
        fitted = Fitted(geometries(0, c.gate.latent), geometries(1, c.gate.output_latent), words)
    return distributed.broadcast(fitted)


def first_of_each(rows: LabelledExamples, count: int) -> LabelledExamples:
    """The first rows of every expert, at most so many: a geometry needs no more, and each costs a forward pass."""
    taken: Counter[int] = Counter()
    kept = LabelledExamples([], [])
    for example, expert in zip(rows.examples, rows.experts, strict=True):
        if taken[expert] < count:
            kept.examples.append(example)
            kept.experts.append(expert)
        taken[expert] += 1
    return kept


def keep_calibrators(job: AlignJob, directory: Path, made_from: dict[str, Any]) -> tuple[Fitted, dict[str, str]]:
    """Fitted once, and read again where the stage goes on, with their files' hashes: other ranks would round otherwise.

    Collective.
    """
    path = directory / "calibrators"

    def is_there() -> bool:
        try:
            return manifest.is_current(path, made_from)
        except DataError as damage:
            console.warn(f"{damage}: fitted again")
            return False

    def write(fitted: Fitted) -> None:
        path.mkdir(parents=True, exist_ok=True)
        save_file(fitted.tensors(), path / "fitted.safetensors")
        manifest.write(path, made_from, {})

    if distributed.on_main(is_there):
        fitted = Fitted.of(load_file(path / "fitted.safetensors"))
    else:
        fitted = fit_calibrators(job)
        distributed.on_main(partial(write, fitted))
    return fitted, distributed.on_main(lambda: manifest.read(path)["files"])


def align(job: AlignJob, keep: KeeperOf, made_from: dict[str, Any]) -> tuple[AlignXForCausalLM, list[float | None]]:
    """Stage 2 from start to end: the trained, calibrated model on the fused path, and its losses. Collective."""
    c = job.config
    keeper = keep("stage2", made_from)
    if keeper.directory:
        fitted, hashes = keep_calibrators(job, keeper.directory, made_from)
        keeper = replace(keeper, inputs=made_from | {"calibrators": hashes})
    else:
        fitted = fit_calibrators(job)
    placement = Placement(c.align.ep_size, distributed.rank() % c.align.ep_size)
    model = assemble(job, fitted, placement).to(distributed.device())
    freeze_trunk(model)
    plan = engines.Plan.of(c.align, c.model.dtype, c.align.steps)
    template = engines.read_template(c.align.deepspeed, "align.deepspeed")
    filled = engines.fill(template, plan, distributed.world_size())
    make_expert_groups(c.align.ep_size)
    engine = engines.start(model, parameter_groups(model, c), filled, plan)
    pad_id = pad_token(job.base.tokenizer)
    batches = partial(micro_batches, job.rows, plan, pad_id, c.seed)
    keeper = replace(keeper, scribe=RouterCurves(c.expert_names, keeper.scribe))
    with console.progress("align", plan.steps) as bar:
        losses = train(engine, batches, _step_loss(c), plan, bar, keeper)
    trained = {name: t.detach().cpu() for name, t in engine.module.fused_state().items()}
    engine.destroy()
    fused = assemble(job, fitted, None)
    parameters = dict(fused.named_parameters())
    fused.load_state_dict({k: v for k, v in trained.items() if k in parameters}, strict=False)
    fused.to(distributed.device()).eval()
    calibrate(fused, job.calibration_rows, pad_id, c.evaluation.batch)
    return fused, losses


def make_expert_groups(ep_size: int) -> None:
    """DeepSpeed makes missing groups itself, but announces it from every rank."""
    groups = load_deepspeed().utils.groups
    if f"ep_size_{ep_size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Experts apart, because DeepSpeed reduces them over their own group, and at their own learning rate."""
    moe = load_deepspeed().moe.utils
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    dense = engines.decay_groups([(n, p) for n, p in named if not moe.is_moe_param(p)], config.align.weight_decay)
    expert = {
        "params": [p for _, p in named if moe.is_moe_param(p)],
        "lr": config.align.lr * config.align.expert_lr_scale,
        "weight_decay": 0.0,
        "name": "experts",
    }
    groups: list[dict[str, Any]] = moe.split_params_into_different_moe_groups_for_optimizer([*dense, expert])
    return [group for group in groups if group["params"]]


def _step_loss(config: RunConfig) -> StepLoss:
    def step_loss(engine: Any, part: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        b = part.batch
        output = engine(
            input_ids=b.input_ids, attention_mask=b.attention_mask, prompt_mask=b.prompt_mask, use_cache=False
        )
        terms = align_terms(engine.module, output.logits, b.labels, part.experts, part.lm_scale)
        return terms.total(config.align), terms.scalars() | router_sums(engine.module, part)

    return step_loss


def calibrate(model: AlignXForCausalLM, rows: LabelledExamples, pad_id: int, batch: int) -> None:
    """Fit each gate's post-hoc temperature on rows kept back from training. Collective."""
    labels = torch.tensor(rows.experts)
    terms = gate_terms(model, rows, pad_id, batch)
    for index, gate in gates_of(model).items():
        gate.calibration_temperature.fill_(fit_temperature(sum_of(terms[index]), labels))
