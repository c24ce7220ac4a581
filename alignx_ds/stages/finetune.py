"""Fine-tune the AlignX layers' FFNs, LoRA on them, or all weights under ZeRO-3: stage 1's specialists, two baselines.

A fine-tune leaves a directory with its task vectors, a specialist's also with the factors of its expert. An adapter
that the recipe names for an axis leaves the same directory, and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import hypot
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from alignx_ds.config.parse import substance
from alignx_ds.config.schema import REGULARISED, KeepConfig, RunConfig
from alignx_ds.data.compared import ComparedRows
from alignx_ds.data.encode import Example, LabelledExamples, pad_token
from alignx_ds.data.inputs import COMPARED, INJECTED
from alignx_ds.experts.adapters import Adapter
from alignx_ds.experts.beside import write_beside
from alignx_ds.experts.features import expert_factors
from alignx_ds.experts.lora import Lora, add_lora, lora_factors
from alignx_ds.experts.low_rank import LowRank
from alignx_ds.experts.task_vectors import (
    Changes,
    add_task_vector,
    layer_file,
    projections,
    read_task_vector,
    task_vectors,
)
from alignx_ds.mocae.experts import ATTENTION, PROJECTIONS, Factors
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed, signals
from alignx_ds.stages.stage import Stage, StageContext, ensure, set_up, trained
from alignx_ds.training import engine as engines
from alignx_ds.training import flops
from alignx_ds.training.evaluation import Evaluation
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.keeping import Keeping
from alignx_ds.training.latent_noise import noisy_language_loss
from alignx_ds.training.loop import StepLoss, builder
from alignx_ds.training.losses import language_loss
from alignx_ds.training.objectives import Settings
from alignx_ds.training.preferences import ObjectiveLoss

SEQUENTIAL, MIXED = "sequential", "mixed"


@dataclass(frozen=True)
class FineTune:
    """One fine-tune: the axes whose rows it trains on, and the fine-tune that it starts from (None: the base model)."""

    name: str
    axes: tuple[str, ...]
    start: str | None = None
    is_expert: bool = False  # whether its directory also holds the factors of an expert
    before: tuple[FineTune, ...] = ()  # what it keeps, by the terms of `keep`
    keep: KeepConfig | None = None


def train_specialists(context: StageContext) -> dict[str, Path]:
    """Stage 1: the directory of a specialist for each axis. Raises Stopped. Collective."""
    made = {}
    for tune in specialists(context.config):
        signals.stop_if_requested("stage 1")
        made[tune.name] = fine_tune(context, tune)
    return made


def specialists(config: RunConfig) -> list[FineTune]:
    """The fine-tune of each axis that becomes its expert. With `train.keep`, each keeps those before it."""
    found: list[FineTune] = []
    keep = config.train.keep if config.train.keep.is_on else None
    for axis in config.axes:
        found.append(FineTune(axis, (axis,), is_expert=True, before=tuple(found) if keep else (), keep=keep))
    return found


def train_baselines(context: StageContext) -> dict[str, Path]:
    """By baseline, the directories of the sequential fine-tunes and of the mixed one. Collective."""
    axes, root = list(context.config.axes), context.out.specialists
    for job in baseline_fine_tunes(context.config):
        fine_tune(context, job)
    made = {name: root / sequential_name(axes, name) for name in sequences(context.config)}
    return {**made, MIXED: root / mixed_name(axes)}


def sequences(config: RunConfig) -> list[str]:
    """The run's sequential fine-tunes: the plain one, and the regularised one if the recipe lists it."""
    return [SEQUENTIAL, *(name for name in (REGULARISED,) if name in config.baselines.make)]


def sequential_name(axes: list[str], sequence: str = SEQUENTIAL) -> str:
    """The last fine-tune of the sequence over these axes; with one axis that is its specialist."""
    return axes[0] if len(axes) == 1 else f"{sequence}_{len(axes)}_{axes[-1]}"


def mixed_name(axes: list[str]) -> str:
    """The fine-tune on all axes' rows at once. A run with one axis more makes another, beside this one."""
    return f"{MIXED}_{len(axes)}_{axes[-1]}"


def baseline_fine_tunes(config: RunConfig) -> list[FineTune]:
    """One axis after another, starting from the first axis's specialist; and all axes' rows at once, shuffled."""
    axes = list(config.axes)
    found = [tune for name in sequences(config) for tune in _sequence(config, name)]
    return [*found, FineTune(mixed_name(axes), tuple(axes))]


def _sequence(config: RunConfig, name: str) -> list[FineTune]:
    """What it makes after the first axis's specialist."""
    axes, found = list(config.axes), specialists(config)[:1]
    keep = config.baselines.sequential_regularised if name == REGULARISED else None
    for count in range(2, len(axes) + 1):
        own, start = sequential_name(axes[:count], name), found[-1].name
        found.append(FineTune(own, (axes[count - 1],), start, before=tuple(found) if keep else (), keep=keep))
    return found[1:]


def fine_tune(context: StageContext, tune: FineTune) -> Path:
    """The fine-tune's directory, made unless it is there. Raises ConfigError for an adapter that can't be used.

    Collective.
    """
    earlier = {name for name in (tune.start, *(kept.name for kept in tune.before)) if name}
    fingerprints = {name: manifest.read(context.out.specialists / name)["fingerprint"] for name in earlier}
    stage, adapter = stage_of(context, tune, fingerprints), _adapter(context, tune)
    if adapter is not None:
        make = partial(_adopt, context, tune, adapter, stage.directory)
        return ensure(stage, context, lambda job: distributed.on_main(make))
    return ensure(stage, context, partial(_train, context, tune, stage.directory))


def stage_of(context: StageContext, tune: FineTune, fingerprints: Mapping[str, str]) -> Stage:
    """The fine-tune's stage, with everything that its result depends on; `fingerprints` are those of earlier ones."""
    directory, inputs = context.out.specialists / tune.name, _inputs(context, tune, fingerprints)
    return Stage(tune.name, f"stage1/{tune.name}", directory, inputs, shared=bool(context.config.specialists))


def _adapter(context: StageContext, tune: FineTune) -> Adapter | None:
    path = context.config.axes[tune.name].adapter if tune.is_expert else ""
    return Adapter(path, f"axes.{tune.name}.adapter") if path else None


def _inputs(context: StageContext, tune: FineTune, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    c, base, data = context.config, context.base, context.data
    if (adapter := _adapter(context, tune)) is not None:
        return {"base": base.digest, "layers": base.layers, "adapter": adapter.digest}
    settings = _objective(context, tune)
    return {
        "base": base.digest,
        "layers": base.layers,
        "dtype": c.model.dtype,
        "seed": c.seed,
        "train": _train_settings(c),
        "deepspeed": engines.settings_of(c.train.deepspeed, "train.deepspeed"),
        "experts": _expert_settings(c, tune),
        "rows": [[axis, data.digests[f"{INJECTED}{axis}"]] for axis in tune.axes],
        "objective": [asdict(settings), data.digests.get(f"{COMPARED}{tune.axes[0]}")] if settings else None,
        "start": fingerprints[tune.start] if tune.start else None,
        **({"evaluated": _evaluated(context, tune, settings).digest} if c.train.evaluate.every else {}),
        **({"keep": _kept(context, tune, tune.keep, fingerprints)} if tune.keep else {}),
        **({"noise_layers": noisy} if (noisy := _noise_layers(c, tune)) else {}),
    }


def _objective(context: StageContext, tune: FineTune) -> Settings | None:
    """What it minimises; None: the NLL of good answers, which a fine-tune on several axes always does."""
    axis = context.config.axes[tune.axes[0]]
    return None if len(tune.axes) > 1 or axis.objective == "sft" else Settings.of(axis)


def _noise_layers(c: RunConfig, tune: FineTune) -> list[int]:
    """Those of its axis; a fine-tune on several axes has none."""
    return sorted(set(c.axes[tune.axes[0]].noise_layers)) if len(tune.axes) == 1 else []


def _kept(context: StageContext, tune: FineTune, keep: KeepConfig, fingerprints: Mapping[str, str]) -> list[Any]:
    """What the kept terms depend on."""
    return [asdict(keep), [fingerprints[kept.name] for kept in tune.before], _kept_rows(context, tune, keep).digest]


def _kept_rows(context: StageContext, tune: FineTune, keep: KeepConfig) -> LabelledExamples:
    """The first rows of the generalist and of each axis that was learned before."""
    train = context.data.train
    plain = [e for e, expert in zip(train.examples, train.experts, strict=True) if not expert and e.answer_length]
    sources = [plain, *(context.data.injected[axis] for kept in tune.before for axis in kept.axes)]
    rows = [example for source in sources for example in source[: keep.rows]]
    return LabelledExamples(rows, [0] * len(rows))


def _train_settings(c: RunConfig) -> dict[str, Any]:
    """Without LoRA's where none is trained, without the evaluation's where there is none, and without what is kept."""
    unused = {"lora": not is_lora(c), "evaluate": not c.train.evaluate.every, "keep": True}
    return {name: value for name, value in substance(c.train).items() if not unused.get(name)}


def _expert_settings(c: RunConfig, tune: FineTune) -> dict[str, Any] | None:
    """LoRA's rank counts for every fine-tune, and no features weight an approximation."""
    if is_lora(c):
        return {"rank": c.experts.rank}
    return asdict(c.experts) if tune.is_expert else None


def is_lora(c: RunConfig) -> bool:
    """Whether stage 1 trains low-rank factors."""
    return c.train.trainable == "lora"


def _train(context: StageContext, tune: FineTune, directory: Path, job: TrainingJob) -> dict[str, Any]:
    config, base, settings = context.config, context.base, _objective(context, tune)
    rows = context.data.taught(tune.axes[0]) if settings else _imitated(context.data.injected, tune)
    # As many epochs over its rows as a specialist makes: over three axes a fine-tune takes the steps of all three.
    counts = [len(rows.examples)] if settings else [len(context.data.injected[axis]) for axis in tune.axes]
    steps = sum(engines.steps_of(config.train, count) for count in counts)
    setup = set_up(context, config.train, "train", steps, rows)
    zero3 = HfDeepSpeedConfig(setup.deepspeed)  # while it is alive, from_pretrained shards the weights as it loads them
    model = load_backbone(base)
    if tune.start:
        add_task_vector(model, base, context.out.specialists / tune.start)
    if is_lora(config):
        add_lora(model, base.table, base.layers, Lora.of(config), config.seed)
    elif not config.trains_all("train"):
        train_ffns_alone(model, base)
    groups = engines.decay_groups(list(model.named_parameters()), setup.plan.weight_decay)
    factors = Lora.of(config).numbers(base) // len(base.layers) if is_lora(config) else None
    needed = flops.fine_tune(base.config, base.layers, factors, learned=rows.learned_share)
    if config.trains_all("train"):
        needed = flops.whole_model(base.config, rows.learned_share)
    how: Any = {"title": f"fine-tune {tune.name}", "flops": needed, "packed": True}
    loss: StepLoss = language_loss
    if settings:
        compared = context.data.compared.get(tune.axes[0], ComparedRows(rows))
        taught = ObjectiveLoss(settings, compared, setup.plan, pad_token(base.tokenizer), config.seed, packed=True)
        loss, job = taught, taught.of_job(job)
    if tune.keep:
        job = _keeping(context, tune, tune.keep, model, setup.plan).of_job(job)
    if config.train.evaluate.every:
        job = job.evaluated(_evaluation(context, setup.plan, _evaluated(context, tune, settings), loss))
    if noisy := _noise_layers(config, tune):  # after the evaluation, which is made without noise
        loss = partial(noisy_language_loss, [base.table.decoder_layers(model)[layer] for layer in noisy])
    with trained(context, setup, model, groups, rows, loss, job, **how) as (module, losses):
        extract = _extract_lora if is_lora(config) else _extract
        layers = extract(context, tune, module, directory)
        beside = _extract_beside(base, tune, module, directory, layers) if config.trains_all("train") else {}
    del zero3
    evaluation = {"evaluation": job.evaluation.facts(len(losses))} if job.evaluation else {}
    return {"name": tune.name, "axes": list(tune.axes), "losses": losses, **evaluation, **beside, "layers": layers}


def _keeping(context: StageContext, tune: FineTune, keep: KeepConfig, model: nn.Module, plan: engines.Plan) -> Keeping:
    """The terms that keep what the fine-tunes before have changed, each in its own step."""
    base, vectors = context.base, []
    for layer in base.layers:
        changes = [_own_change(context, kept, layer) for kept in tune.before] if keep.collision else []
        for p, weight in projections(model, base.table, layer).items():
            vectors.append((weight, [change[p] for change in changes]))
    return Keeping(keep, vectors, _kept_rows(context, tune, keep), plan, pad_token(base.tokenizer))


def _own_change(context: StageContext, tune: FineTune, layer: int) -> Changes:
    """A finished fine-tune's change of the model that it started from."""
    root = context.out.specialists
    change = read_task_vector(root / tune.name, layer)
    before = read_task_vector(root / tune.start, layer) if tune.start else dict.fromkeys(PROJECTIONS, 0)
    return {p: change[p] - before[p] for p in PROJECTIONS}


def _imitated(examples: dict[str, list[Example]], tune: FineTune) -> LabelledExamples:
    """The rows of all its axes, whose good answers are imitated."""
    pooled = [example for axis in tune.axes for example in examples[axis]]
    return LabelledExamples(pooled, [0] * len(pooled))


def _evaluated(context: StageContext, tune: FineTune, settings: Settings | None) -> ComparedRows:
    """The rows of the calibration split that it is evaluated on, as it trains on the others."""
    imitated = ComparedRows(_imitated(context.data.evaluated, tune))
    return context.data.evaluated_compared.get(tune.axes[0], imitated) if settings else imitated


def _evaluation(context: StageContext, plan: engines.Plan, rows: ComparedRows, loss: StepLoss) -> Evaluation:
    hooks: dict[str, Any] = {"loss": loss}
    if isinstance(loss, ObjectiveLoss):
        same = loss.on(rows)
        hooks = {"loss": same, "at_start": same.at_start, "before": same.before_step, "scalars": same.scalars}
    build = builder(rows.examples, pad_token(context.base.tokenizer), packed=True)
    size = plan.micro_batch(distributed.world_size())
    return Evaluation(context.config.train.evaluate, rows.examples, build, size=size, steps=plan.steps, **hooks)


def train_ffns_alone(model: nn.Module, base: BaseModel) -> None:
    """Freeze everything but the FFN weights of the AlignX layers."""
    names = {base.table.weight_name(layer, p) for layer in base.layers for p in PROJECTIONS}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _adopt(context: StageContext, tune: FineTune, adapter: Adapter, directory: Path) -> dict[str, Any]:
    """The adapter's factors are the expert's, and their product is its task vector: nothing is trained or rounded."""
    facts = {}
    for layer, factors in adapter.factors(context.base).items():
        facts[str(layer)] = _write_exact(directory, layer, factors)
    lost = adapter.lost(context.base)
    what = f", but for {lost:.1%} of its squared norm: the gate decides after the lowest AlignX layer's attention"
    console.say(f"{tune.name}: the adapter {adapter.given} is its expert{what if lost else ''}")
    given = {"adapter": adapter.given, "lost": lost}
    return {"name": tune.name, "axes": list(tune.axes), "losses": [], **given, "layers": facts}


def _extract_lora(context: StageContext, tune: FineTune, model: Any, directory: Path) -> dict[str, Any]:
    """As `_extract`, of LoRA's factors, which are the expert as they are."""
    start = context.out.specialists / tune.start if tune.start else None
    facts: dict[str, Any] = {}
    for layer, factors in lora_factors(model, context.base):
        if factors is None:
            continue
        if tune.is_expert:
            facts[str(layer)] = _write_exact(directory, layer, factors)
        else:
            before = read_task_vector(start, layer) if start else {}
            changes = before | {p: before.get(p, 0) + factors.delta(p) for p in factors.down}
            facts[str(layer)] = _write_layer(directory, layer, changes, None)
    return _merged(facts)


def _extract(context: StageContext, tune: FineTune, model: Any, directory: Path) -> dict[str, Any]:
    """Write the task vectors layer by layer; for a specialist also its factors, fitted to features of its own rows.

    Returns the manifest's facts by layer. Collective.
    """
    config, base = context.config, context.base
    changes = {layer: change for layer, change in task_vectors(model, base) if change}
    fitted: dict[int, dict[str, LowRank]] = {}
    if tune.is_expert:
        examples = context.data.injected[tune.axes[0]][: config.experts.feature_rows]
        fitted = expert_factors(model, base.table, changes, examples, pad_token(base.tokenizer), config.experts.rank)
    facts: dict[str, Any] = {}
    for layer, change in changes.items():
        if tune.start and not config.trains_all("train"):  # an adapter's change of the attention, which is not trained
            before = read_task_vector(context.out.specialists / tune.start, layer)
            change |= {p: before[p] for p in ATTENTION if p in before}
        low_rank = fitted.get(layer, {})
        factors = Factors({p: f.down for p, f in low_rank.items()}, {p: f.up for p, f in low_rank.items()})
        facts[str(layer)] = _write_layer(directory, layer, change, factors if low_rank else None)
        for p, f in low_rank.items():
            facts[str(layer)][p] |= {"error": f.error, "plain_svd_error": f.plain_svd_error}
    return _merged(facts)


def _extract_beside(
    base: BaseModel, tune: FineTune, model: Any, directory: Path, layers: dict[str, Any]
) -> dict[str, Any]:
    """Write what was trained beside the AlignX layers' FFNs; the manifest's facts of it. Collective."""
    numbers, norm = write_beside(model, base, directory)
    whole = hypot(norm, *(of_projection["norm"] for facts in layers.values() for of_projection in facts.values()))
    share = norm / whole if whole else 0.0
    if tune.is_expert:
        found = f"{share:.1%} of the change's L2 norm is in {numbers:,} weights beside the FFNs of the AlignX layers"
        console.say(f"{tune.name}: {found}, and lost to its expert")
    return {"beside": {"parameters": numbers, "norm": norm, "share": share}}


def _write_exact(directory: Path, layer: int, factors: Factors) -> dict[str, Any]:
    """The layer's file of an expert whose task vector is the product of its factors."""
    facts = _write_layer(directory, layer, {p: factors.delta(p) for p in factors.down}, factors)
    return {p: of_projection | {"error": 0.0, "plain_svd_error": 0.0} for p, of_projection in facts.items()}


def _write_layer(directory: Path, layer: int, changes: Changes, factors: Factors | None) -> dict[str, Any]:
    """A layer's file: its task vector, and an expert's factors. Returns facts by projection."""
    tensors = {f"task_vector.{p}": change.contiguous() for p, change in changes.items()}
    facts: dict[str, Any] = {p: {"norm": float(change.norm())} for p, change in changes.items()}
    if factors is not None:
        for p in factors.down:
            tensors[f"factors.{p}.down"] = factors.down[p].cpu().contiguous()
            tensors[f"factors.{p}.up"] = factors.up[p].cpu().contiguous()
            facts[p]["rank"] = factors.rank(p)
    save_file(tensors, layer_file(directory, layer))
    return facts


def _merged(facts: dict[str, Any]) -> dict[str, Any]:
    """All ranks' facts. Collective."""
    merged: dict[str, Any] = {}
    for part in distributed.gather(facts):
        merged |= part
    return merged
