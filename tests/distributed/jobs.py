"""What the ranks do, job by job, once their process group stands."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed_jsons import JSONS, PRESETS
from evaluated import evaluated, moved
from freed import freed
from keeping import keeping
from lora_fine_tunes import lora
from objectives import objectives
from problems import (
    ALIGNX_LAYERS,
    CALIBRATION_ROWS,
    DECODING,
    EXAMPLES,
    EXPERTS,
    IMBALANCED,
    LABELS,
    MODES,
    NAMES,
    PAD,
    PARITY_ROWS,
    PROMPT_ROWS,
    SEED,
    STAGE_ROWS,
    TABLE,
    VARIANTS,
    align_config,
    cotangents,
    dense_parameters,
    fine_tune_config,
    fine_tune_context,
    fusion_context,
    generated,
    imbalanced_steps,
    mixture,
    stopped_after_two_steps,
    uneven_mixture,
    whole_stage_config,
)
from rehearsed import rehearsed
from restoring import restoring
from safetensors.torch import load_file
from sharded import sharded
from stage_contexts import stage_context
from tiny_models import attention_experts, base_model, connect, one_hot, padded
from transformers.integrations import HfDeepSpeedConfig
from whole_fine_tunes import whole
from whole_logits import answer_nll

from alignx_ds.config.schema import CheckpointsConfig, RunConfig
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.data.sampling import share
from alignx_ds.errors import Stopped
from alignx_ds.experts.task_vectors import add_task_vector, layer_file, task_vectors
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.mocae.parallel import ParallelMixture
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.routing.curves import step_scalars
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import distributed
from alignx_ds.runtime.console import Progress
from alignx_ds.stages import align, finetune, fuse
from alignx_ds.training import engine, loop
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.losses import language_loss
from alignx_ds.training.manager import CheckpointManager
from alignx_ds.training.metrics import MicroBatchLoss

RANK, WORLD = distributed.rank(), distributed.world_size()


def expert_gradients(model: AlignXForCausalLM) -> dict[str, torch.Tensor]:
    """By layer, global expert id, factor and projection, of the experts that this rank hosts."""
    found = {}
    for index, layer in zip(ALIGNX_LAYERS, alignx_layers(model), strict=True):
        assert isinstance(layer.mixture, ParallelMixture)
        for offset, expert in enumerate(layer.mixture.local_experts()):
            for side in ("down", "up"):
                for p in PROJECTIONS:
                    gradient = getattr(expert, side)[p].grad
                    found[f"{index}.{layer.mixture.first_local + offset}.{side}.{p}"] = gradient
    return found


def one_pass(ep_size: int, mode: str, forced: list[int] | None = None, pads: bool = False) -> dict[str, Any]:
    """Forward and backward over this rank's rows: their logits, and the gradients of this rank's share of the loss.

    `pads`: the rows are padding and nothing else.
    """
    top_k, training = MODES[mode]
    align.make_expert_groups(ep_size)
    model = connect(mixture(top_k, Placement(ep_size, RANK % ep_size))).train(training)
    own = share(list(range(len(PARITY_ROWS))), RANK, WORLD)
    ids, mask = padded([PARITY_ROWS[i] for i in own], side="left" if RANK % 2 else "right", extra=RANK)
    if pads:
        mask.zero_()
    overruled = one_hot([forced[i] for i in own]) if forced else None
    logits = model(ids, mask, forced=overruled, use_cache=False).logits
    rows = {i: logits[b][mask[b].bool()] for b, i in enumerate(own)}
    sum((row * cotangents()[i][: len(row)]).sum() for i, row in rows.items()).backward()
    return {
        "logits": {i: row.detach() for i, row in rows.items()},
        "dense": {n: p.grad for n, p in dense_parameters(model).items()},
        "experts": expert_gradients(model),
        "padding": [layer.mixture.dispatch.padding_fraction for layer in alignx_layers(model)],
    }


def parity(out: Path) -> dict[str, Any]:
    sizes = [n for n in (1, 2, 4) if WORLD % n == 0]
    return {f"{mode} ep{n}": one_pass(n, mode) for mode in MODES for n in sizes}


def imbalanced(out: Path) -> dict[str, Any]:
    found = {f"{name} {mode}": one_pass(WORLD, mode, e) for name, e in IMBALANCED.items() for mode in ("top1", "dense")}
    return found | {f"pads alone {mode}": one_pass(WORLD, mode, pads=RANK == 1) for mode in MODES}


def lockstep(out: Path) -> dict[str, Any]:
    """Answers of this rank's own prompts through plain `generate`, by ep_size and decoding."""
    found = {}
    for ep_size in (n for n in (1, 2, 4) if WORLD % n == 0):
        align.make_expert_groups(ep_size)
        model = connect(mixture(placement=Placement(ep_size, RANK % ep_size))).eval()
        found |= {f"{decoding} ep{ep_size}": generated(model, PROMPT_ROWS[RANK], decoding) for decoding in DECODING}
    return found


def steps(out: Path) -> dict[str, Any]:
    """Stage 2's training on real engines, by variation."""
    found = {}
    for variant in VARIANTS[WORLD]:
        kind, *how, ep_size, accumulation = variant.split()
        found[variant] = trained(int(ep_size[2:]), int(accumulation[3:]), kind, how)
    return found


def stage2_engine(config: RunConfig, kind: str = "adamw") -> tuple[Any, engine.Plan]:
    placement = align.placement(config.align.ep_size)
    return started(mixture(placement=placement, frozen=not config.align.expert_lr_scale), config, kind)


def started(model: AlignXForCausalLM, config: RunConfig, kind: str) -> tuple[Any, engine.Plan]:
    plan = engine.Plan.of(config.align, "float32", config.align.steps)
    template = engine.read_template(config.align.deepspeed, "align.deepspeed")
    if kind == "sgd":  # its step shows the gradient's scale, which Adam's hides
        template["optimizer"] = {"type": "SGD", "params": {"lr": "auto", "weight_decay": "auto"}}
    align.make_expert_groups(config.align.ep_size)
    groups = align.parameter_groups(model, config)
    return engine.start(model, groups, engine.fill(template, plan, WORLD), plan), plan


def trained(ep_size: int, accumulation: int, kind: str, how: list[str]) -> dict[str, Any]:
    config = align_config(ep_size, accumulation, 0.0 if "frozen" in how else 0.5)
    made, plan = stage2_engine(config, kind)
    forced = "forced" in how
    norms: list[float] = []
    curves: list[dict[str, float]] = []

    def log(step: int, values: dict[str, float]) -> None:
        norms.append(float(made.get_global_grad_norm()))
        curves.append(values)

    if forced:
        forced_rows = (
            [loop.MicroBatch(*part) for part in step] for step in imbalanced_steps(WORLD, RANK, accumulation)
        )
        batches: loop.Batches = lambda start: forced_rows  # noqa: E731
    else:
        batches = partial(loop.micro_batches, LabelledExamples(EXAMPLES, LABELS), plan, PAD, SEED)
    loss = forced_loss(config) if forced else align.step_loss(config)
    job = TrainingJob("steps", log=log, scalars=partial(step_scalars, NAMES))
    losses = loop.train(made, batches, loss, plan, Progress(), job)
    state = made.module.fused_state()
    generalists = [layer.mixture.factors()[0] for layer in alignx_layers(made.module)]
    sides = [t for g in generalists for t in (*g.down.values(), *g.up.values())]
    made.destroy()
    weights = {n: t.detach().clone() for n, t in state.items()}
    generalist = [bool(t.any()) for t in sides]
    return {"losses": losses, "norms": norms, "curves": curves, "weights": weights, "generalist": generalist}


def forced_loss(config: Any) -> loop.StepLoss:
    def loss(made: Any, part: loop.MicroBatch) -> MicroBatchLoss:
        b, overruled = part.batch, torch.nn.functional.one_hot(part.experts, EXPERTS).float()
        logits = made(b.input_ids, b.attention_mask, b.prompt_mask, forced=overruled, use_cache=False).logits
        terms = align.align_terms(made.module, answer_nll(logits, b.labels), part.needs, part.lm_scale)
        return MicroBatchLoss(terms.total(config.align))

    return loss


def untrained(out: Path) -> dict[str, Any]:
    """Stage 2 with and without trained experts, and again in a new engine from the checkpoint after its second step."""
    found: dict[str, Any] = {}
    for scale in (0.5, 0.0):
        config, losses = align_config(WORLD, 1, scale), []
        settings = CheckpointsConfig(every=2)
        manager = CheckpointManager("stage2", {"scale": scale}, out / f"untrained{WORLD} {scale}", settings, SEED)
        for _ in range(2):
            made, plan = stage2_engine(config)
            batches = partial(loop.micro_batches, LabelledExamples(EXAMPLES, LABELS), plan, PAD, SEED)
            job = TrainingJob("stage2", manager)
            losses.append(loop.train(made, batches, align.step_loss(config), plan, Progress(), job))
            weights = {n: t.detach().clone() for n, t in made.module.fused_state().items()}
            gradients = [n for n, p in made.module.named_parameters() if p.requires_grad]
            partitions = sum(p.numel() for p in made.optimizer.single_partition_of_fp32_groups)
            made.destroy()
        path = manager.directory / "step_00000002"
        files = [load_file(file) for file in sorted(path.glob("rank*.safetensors"))]
        names = sorted(name for file in files for name in file)
        numbers = sum(tensor.numel() for file in files for tensor in file.values())
        facts = {"names": names, "numbers": numbers, "trained": gradients, "partitions": partitions}
        found[str(scale)] = {"losses": losses, "weights": weights, **facts}
    return found


def paths(out: Path) -> dict[str, Any]:
    """Stage 2 on the path of each ep_size, and again from the checkpoint after the other's second step."""
    found: dict[str, Any] = {}
    for kind, combine in (("choice", "outputs"), ("needs", "weights")):
        for before, after in ((WORLD, 0), (0, WORLD)):
            root = out / f"paths{WORLD} {kind}"
            manager = CheckpointManager(f"ep{before}", {}, root, CheckpointsConfig(every=2), SEED)
            whole = _on_path(kind, combine, before, manager)
            found[f"{kind} ep{before}"] = {"checkpoint": manager.directory, **whole}
            found[f"{kind} ep{before} → ep{after}"] = _on_path(kind, combine, after, manager)
    return found


def _on_path(kind: str, combine: str, ep_size: int, manager: CheckpointManager) -> dict[str, Any]:
    config = align_config(ep_size, 1)
    model = uneven_mixture(kind, combine, align.placement(ep_size))
    align.mix_outputs(model)
    made, plan = started(model, config, "adamw")
    rows = LabelledExamples(EXAMPLES, LABELS)
    batches = partial(loop.micro_batches, rows, plan, PAD, SEED)
    losses = loop.train(made, batches, align.step_loss(config), plan, Progress(), TrainingJob("paths", manager))
    weights = {n: t.detach().clone() for n, t in made.module.fused_state().items()}
    made.destroy()
    return {"losses": losses, "weights": weights}


def jsons(out: Path) -> dict[str, Any]:
    """Losses of stage 1 under JSONs of other tools and the presets, and again from the checkpoint after two steps."""
    names = ("ds_z0", "ds_z2_offload", "ds_z3_offload", *PRESETS)
    return {name: [_with_json(out, name), _with_json(out, name)] for name in names}


def _with_json(out: Path, name: str) -> list[float | None]:
    config = fine_tune_config(out / "base")
    base, plan = BaseModel(config.model), engine.Plan.of(config.train, "float32", config.train.steps)
    template = JSONS.get(name) or engine.read_template(f"ds_configs/{name}.json", "train.deepspeed")
    filled = engine.fill(template, plan, WORLD, base.config.hidden_size)
    manager = CheckpointManager(name, {}, out / f"jsons{WORLD}", CheckpointsConfig(every=2), SEED)
    zero3 = HfDeepSpeedConfig(filled)
    model = load_backbone(base)
    finetune.train_ffns_alone(model, base)
    made = engine.start(model, engine.decay_groups(list(model.named_parameters()), plan.weight_decay), filled, plan)
    batches = partial(loop.micro_batches, LabelledExamples(EXAMPLES, LABELS), plan, PAD, SEED)
    losses = loop.train(made, batches, language_loss, plan, Progress(), TrainingJob(name, manager))
    made.destroy()
    del zero3
    return losses


def whole_stage(out: Path) -> dict[str, Any]:
    """Stage 2 from its rows to the calibrated model, by ep_size."""
    found = {}
    for how in ("ep1", "ep2", "ep0", "ep0 zero3") if WORLD == 2 else ("ep1",):
        config = whole_stage_config(out / "base", how)
        context = stage_context(config, Outputs(out / "whole_stage", out), STAGE_ROWS, CALIBRATION_ROWS)
        curves: list[dict[str, float]] = []
        job = TrainingJob("stage2", log=lambda step, values, curves=curves: curves.append(values))
        model, losses = align.train_mixture(context, attention_experts(base_model()), job)
        found[how] = {"state": model.state_dict(), "losses": losses, "curves": curves}
    return found


def fine_tune(out: Path) -> dict[str, Any]:
    """Stage 1's own fine-tunes; what they leave on disk is read by the tests."""
    context, still = (fine_tune_context(out, f"fine_tunes{WORLD}", lr) for lr in (0.01, 0.0))
    made = finetune.fine_tune(context, finetune.FineTune("a", ("a",), is_expert=True))
    finetune.fine_tune(context, finetune.FineTune("then_b", ("b",), start="a"))
    finetune.fine_tune(still, finetune.FineTune("a_again", ("b",), start="a"))
    return {"manifest": manifest.read(made)}


def interrupted(out: Path) -> dict[str, Any]:
    """The same fine-tune as `fine_tune`'s, stopped after two of its three steps and given again, three times over."""
    context = fine_tune_context(out, f"interrupted{WORLD}")
    tune = finetune.FineTune("a", ("a",), is_expert=True)
    with pytest.raises(Stopped) as stopped, stopped_after_two_steps():
        finetune.fine_tune(context, tune)
    directory = context.out.specialists / "a"
    left = sorted(path.name for path in directory.iterdir())
    checkpoints = sorted(path.name for path in context.out.checkpoints.glob("*/*/step_*"))
    finetune.fine_tune(context, tune)
    written = [layer_file(directory, layer).stat().st_mtime_ns for layer in ALIGNX_LAYERS]
    finetune.fine_tune(context, tune)
    reused = [layer_file(directory, layer).stat().st_mtime_ns for layer in ALIGNX_LAYERS] == written
    facts = {"stopped": str(stopped.value), "left": left, "checkpoints": checkpoints, "reused": reused}
    return facts | {"removed": not context.out.checkpoints.exists(), "manifest": manifest.read(directory)}


def streamed(out: Path) -> dict[str, Any]:
    """Task vectors streamed from a ZeRO-3 engine, beside the whole trained weights, in both dtypes."""
    return {dtype: _streamed(out, dtype) for dtype in ("float32", "bfloat16")}


def _streamed(out: Path, dtype: str) -> dict[str, Any]:
    config = fine_tune_config(out / "base", lr=0.01 if dtype == "float32" else 1e-5, dtype=dtype)
    base = BaseModel(config.model)
    plan = engine.Plan.of(config.train, dtype, config.train.steps)
    filled = engine.fill(engine.read_template(config.train.deepspeed, "train.deepspeed"), plan, WORLD)
    filled["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shard even the smallest
    zero3 = HfDeepSpeedConfig(filled)
    model = load_backbone(base)
    names = {base.table.weight_name(i, p): (i, p) for i in base.layers for p in PROJECTIONS}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    sharded = all(p.numel() == 0 for p in model.parameters()) if WORLD > 1 else True
    made = engine.start(model, engine.decay_groups(list(model.named_parameters()), plan.weight_decay), filled, plan)
    batches = partial(loop.micro_batches, LabelledExamples(EXAMPLES, LABELS), plan, PAD, SEED)
    loop.train(made, batches, language_loss, plan, Progress(), TrainingJob("streamed"))
    changes = dict(task_vectors(made.module, base))
    whole = {}
    for index in base.layers:
        view = TABLE.view(TABLE.ffn_of(made.module, index))
        for p in PROJECTIONS:
            with deepspeed.zero.GatheredParameters([view.projection(p).weight]):
                whole[index, p] = view.projection(p).weight.detach().clone()
    made.destroy()
    fresh = load_backbone(base)
    add_task_vector(fresh, base, out / f"fine_tunes{WORLD}" / "a")
    added = {}
    for index in base.layers:
        view = TABLE.view(TABLE.ffn_of(fresh, index))
        for p in PROJECTIONS:
            with deepspeed.zero.GatheredParameters([view.projection(p).weight]):
                added[index, p] = view.projection(p).weight.detach().clone()
    del zero3
    return {"changes": changes, "whole": whole, "added": added, "sharded": sharded}


def fusions(out: Path) -> dict[str, Any]:
    """Both fusions' own jobs, by name and accumulation: losses, trained mixtures, and whether a second run reuses."""
    found = {}
    specialists = [out / f"specialist{n}" for n in range(EXPERTS - 1)]
    for name in fuse.SETTINGS:
        for accumulation in (1, 2)[: 3 - WORLD]:
            context = fusion_context(out, f"fusions{WORLD}{accumulation}", accumulation)
            written = []
            for _ in range(2):
                directory = fuse.train_fusion(context, name, specialists)
                written.append((directory / fuse.WEIGHTS).stat().st_mtime_ns)
            losses, tensors = manifest.read(directory)["losses"], load_file(directory / fuse.WEIGHTS)
            found[f"{name} acc{accumulation}"] = {"losses": losses, "tensors": tensors, "written": written}
    return found


WORK = (
    parity,
    imbalanced,
    lockstep,
    steps,
    paths,
    untrained,
    jsons,
    fine_tune,
    lora,
    whole,
    interrupted,
    streamed,
    whole_stage,
    fusions,
    freed,
    rehearsed,
    sharded,
    objectives,
    keeping,
    restoring,
    evaluated,
    moved,
)
JOBS = {job.__name__: job for job in WORK}
