"""Fine-tune one specialist under ZeRO-3 and leave its directory: task vectors, expert factors, manifest.

Sequential and mixed fine-tuning are the same job with other rows and another start. An adapter that is there already
leaves the same directory.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers.integrations import HfDeepSpeedConfig

from alignx_ds.config.parse import substance
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import Example, LabelledExamples, pad_token
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.experts.adapters import Adapter
from alignx_ds.experts.features import expert_factors
from alignx_ds.experts.task_vectors import add_task_vector, layer_file, task_vectors
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.models.backbone import load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed, signals
from alignx_ds.stages.context import StageContext
from alignx_ds.training import engine as engines
from alignx_ds.training.keeper import Keeper, KeeperOf
from alignx_ds.training.loop import micro_batches, train
from alignx_ds.training.losses import language_loss


@dataclass(frozen=True)
class Job:
    """One fine-tune: the axes whose rows it sees, and the specialist that it continues from (None: the base)."""

    name: str
    axes: tuple[str, ...]
    start: str | None = None
    is_expert: bool = False

    def steps(self, shop: Workshop) -> int:
        """Every row is seen as often as its specialist sees it: a job over three axes takes the steps of all three."""
        return sum(engines.steps_of(shop.config.train, len(shop.examples[axis])) for axis in self.axes)


@dataclass(frozen=True)
class Workshop:
    """What every job of stage 1 shares."""

    config: RunConfig
    base: BaseModel
    root: Path  # one directory per job lies in here
    examples: dict[str, list[Example]]  # by axis: injected, encoded training rows
    digests: dict[str, str]  # by axis: hash of the records
    keep: KeeperOf
    shared: bool = False  # whether other runs' specialists may lie in root: then nothing is made over

    def directory(self, name: str) -> Path:
        return self.root / name

    def adapter(self, job: Job) -> Adapter | None:
        """The adapter that the axis's expert is, where the recipe names one."""
        path = self.config.axes[job.name].adapter if job.is_expert else ""
        return Adapter(path, f"axes.{job.name}.adapter") if path else None

    def inputs(self, job: Job) -> dict[str, Any]:
        """Everything that the job's result depends on; what its start depends on comes in through its fingerprint."""
        c, adapter = self.config, self.adapter(job)
        if adapter is not None:
            return {"base": self.base.digest, "layers": self.base.layers, "adapter": adapter.digest}
        start = manifest.read(self.directory(job.start))["fingerprint"] if job.start else None
        return {
            "base": self.base.digest,
            "layers": self.base.layers,
            "dtype": c.model.dtype,
            "seed": c.seed,
            "train": substance(c.train),
            "deepspeed": engines.settings_of(c.train.deepspeed, "train.deepspeed"),
            "experts": asdict(c.experts) if job.is_expert else None,
            "rows": {axis: [self.digests[axis], len(self.examples[axis]), c.axes[axis].prompt] for axis in job.axes},
            "start": start,
        }


def workshop(context: StageContext) -> Workshop:
    data, shared = context.data, bool(context.config.specialists)
    return Workshop(
        context.config,
        context.base,
        context.out.specialists,
        data.injected,
        data.digests,
        context.keeper,
        shared=shared,
    )


def specialists(context: StageContext) -> dict[str, Path]:
    """Stage 1: one fine-tune per axis; their directories. Raises Stopped. Collective."""
    shop = workshop(context)
    for axis in context.config.axes:
        signals.stop_if_requested("stage 1")
        ensure(Job(axis, (axis,), is_expert=True), shop)
    return {axis: shop.directory(axis) for axis in context.config.axes}


def baselines(context: StageContext) -> dict[str, Path]:
    """The sequential and the mixed fine-tune; their directories. Collective."""
    shop, axes = workshop(context), list(context.config.axes)
    for job in baseline_jobs(axes):
        ensure(job, shop)
    return {"sequential": shop.directory(sequential_name(axes)), MIXED: shop.directory(MIXED)}


MIXED = "mixed"


def sequential_name(axes: list[str]) -> str:
    """The directory of the last fine-tune of the sequence; with one axis that is its specialist."""
    return axes[0] if len(axes) == 1 else f"sequential_{len(axes)}_{axes[-1]}"


def baseline_jobs(axes: list[str]) -> list[Job]:
    """One axis after another, starting from the first axis's specialist; and all axes' rows, shuffled."""
    jobs = []
    for count in range(2, len(axes) + 1):
        seen = axes[:count]
        jobs.append(Job(sequential_name(seen), (seen[-1],), start=sequential_name(seen[:-1])))
    return [*jobs, Job(MIXED, tuple(axes))]


def ensure(job: Job, shop: Workshop) -> None:
    """Make the specialist unless a current one is there. Collective."""
    directory, inputs = shop.directory(job.name), shop.inputs(job)
    keeper = shop.keep(f"stage1/{job.name}", inputs)
    if distributed.on_main(lambda: manifest.is_current(directory, inputs)):
        console.say(f"{job.name}: unchanged, reused from {directory}")
    else:
        distributed.on_main(lambda: _clear(job, shop))
        adapter = shop.adapter(job)
        if adapter is not None:
            facts = distributed.on_main(lambda: _adopt(job, adapter, shop.base, directory))
        else:
            facts = _make(job, shop, directory, keeper)
        distributed.barrier()
        distributed.on_main(lambda: manifest.write(directory, inputs, facts))
    keeper.finish()


def _clear(job: Job, shop: Workshop) -> None:
    """An empty directory for the job; what another run may use is never removed."""
    directory = shop.directory(job.name)
    if shop.shared and directory.exists() and any(directory.iterdir()):
        fix = f"{job.name} there was made from other inputs, or is no specialist; choose another directory"
        raise ConfigError(Problem("specialists", str(shop.root), "specialists of this config", fix))
    if directory.exists():
        console.say(f"{job.name}: its inputs have changed, or it is unfinished: made again")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _make(job: Job, shop: Workshop, directory: Path, keeper: Keeper) -> dict[str, Any]:
    config, base = shop.config, shop.base
    plan = engines.Plan.of(config.train, config.model.dtype, job.steps(shop))
    template = engines.read_template(config.train.deepspeed, "train.deepspeed")
    filled = engines.fill(template, plan, distributed.world_size())
    zero3 = HfDeepSpeedConfig(filled)  # kept alive: from_pretrained reads it, and shards while loading
    model = load_backbone(base)
    if job.start:
        add_task_vector(model, base, shop.directory(job.start))
    trained = {base.table.weight_name(layer, p) for layer in base.layers for p in PROJECTIONS}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    groups = engines.decay_groups(list(model.named_parameters()), plan.weight_decay)
    engine = engines.start(model, groups, filled, plan)
    pooled = [(e, 0) for axis in job.axes for e in shop.examples[axis]]
    rows = LabelledExamples([e for e, _ in pooled], [i for _, i in pooled])
    pad_id = pad_token(base.tokenizer)
    batches = partial(micro_batches, rows, plan, pad_id, config.seed, packed=True)
    with console.progress(f"fine-tune {job.name}", plan.steps) as bar:
        losses = train(engine, batches, language_loss, plan, bar, keeper)
    layer_facts = _extract(job, shop, engine.module, directory)
    engine.destroy()
    del zero3
    return {"name": job.name, "axes": list(job.axes), "losses": losses, "layers": layer_facts}


def _adopt(job: Job, adapter: Adapter, base: BaseModel, directory: Path) -> dict[str, Any]:
    """The adapter's factors are the expert's, and their product is its task vector: nothing is trained or rounded."""
    facts: dict[str, Any] = {}
    for layer, factors in adapter.factors(base).items():
        changes = {p: factors.delta(p) for p in PROJECTIONS}
        tensors = {f"task_vector.{p}": changes[p] for p in PROJECTIONS}
        tensors |= {f"factors.{p}.down": factors.down[p].contiguous() for p in PROJECTIONS}
        tensors |= {f"factors.{p}.up": factors.up[p].contiguous() for p in PROJECTIONS}
        save_file(tensors, layer_file(directory, layer))
        exact = {"error": 0.0, "plain_svd_error": 0.0}
        facts[str(layer)] = {
            p: {"norm": float(changes[p].norm()), "rank": factors.rank(p)} | exact for p in PROJECTIONS
        }
    console.say(f"{job.name}: the adapter {adapter.given} is its expert")
    return {"name": job.name, "axes": list(job.axes), "losses": [], "adapter": adapter.given, "layers": facts}


def _extract(job: Job, shop: Workshop, model: Any, directory: Path) -> dict[str, Any]:
    """Stream the task vectors; for an expert also its factors, from one pass over its own rows. Collective."""
    config, base = shop.config, shop.base
    changes = {layer: change for layer, change in task_vectors(model, base) if change}
    factors = {}
    if job.is_expert:
        examples = shop.examples[job.axes[0]][: config.experts.feature_rows]
        factors = expert_factors(model, base.table, changes, examples, pad_token(base.tokenizer), config.experts.rank)
    facts: dict[str, Any] = {}
    for layer, change in changes.items():
        tensors = {f"task_vector.{p}": change[p].contiguous() for p in PROJECTIONS}
        facts[str(layer)] = {p: {"norm": float(change[p].norm())} for p in PROJECTIONS}
        for p, low_rank in factors.get(layer, {}).items():
            tensors[f"factors.{p}.down"] = low_rank.down.cpu().contiguous()
            tensors[f"factors.{p}.up"] = low_rank.up.cpu().contiguous()
            facts[str(layer)][p] |= {
                "rank": low_rank.down.shape[0],
                "error": low_rank.error,
                "plain_svd_error": low_rank.plain_svd_error,
            }
        save_file(tensors, layer_file(directory, layer))
    merged: dict[str, Any] = {}
    for part in distributed.gather(facts):
        merged |= part
    return merged
