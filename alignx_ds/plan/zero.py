"""What DeepSpeed's ZeRO holds of a training stage on one rank, by the stage's JSON.

The sizes follow what DeepSpeed 0.19 allocates (runtime/zero/stage_1_and_2.py and stage3.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignx_ds.config.schema import REGULARISED, OptimizerConfig, RunConfig
from alignx_ds.models.base import BaseModel
from alignx_ds.plan.sizes import buffers, counts
from alignx_ds.training import engine as engines

FP32 = 4  # bytes of a number
ADAM_STATES = 2  # first and second moment, fp32
ADAM_COPIES = 2  # of what it steps through, which torch's AdamW makes where it is not fused
BUCKET, PREFETCH, LIVE, DISTANCE, SUB_GROUP = 500_000_000, 50_000_000, *[1_000_000_000] * 3  # DeepSpeed's defaults


@dataclass(frozen=True)
class Model:
    """Numbers in a stage's model on one rank, before ZeRO shards them."""

    frozen: float  # with buffers
    groups: tuple[tuple[float, int], ...]  # of the optimizer: numbers, and the ranks that share their states
    largest: float  # of a trained parameter
    reused: float = 0.0  # in the layers that the backward pass goes through, and the head
    copies: float = 0.0  # of trained parameters, in the model's dtype, which the loss keeps
    fetched: float = 0.0  # of a frozen parameter, where it is large: the stack of a mixture's experts

    @property
    def trained(self) -> float:
        return sum(numbers for numbers, _ in self.groups)

    @property
    def own(self) -> float:
        """Trained numbers whose optimizer states are this rank's."""
        return sum(numbers / ranks for numbers, ranks in self.groups)


def model_of(config: RunConfig, base: BaseModel, key: str, world_size: int) -> Model:
    """What the stage with the settings at `key` of the recipe trains, and what else its model holds."""
    n, align = counts(config, base), config.align
    whole, trained = n["base model"], n["trained in stage 1"]
    ffns = [base.table.ffn_of(base.skeleton, layer) for layer in base.layers]
    ffn = sum(p.numel() for part in ffns for p in part.parameters())
    largest = max(p.numel() for part in ffns for p in part.parameters())
    layers = base.table.decoder_layers(base.skeleton)[min(base.layers) :]
    reused = (
        sum(p.numel() for layer in layers for p in layer.parameters())
        + base.config.vocab_size * base.config.hidden_size
    )
    fetched = 0 if base.table.projections else largest
    if config.trains_all(key):
        return Model(0, ((whole, world_size),), max(p.numel() for p in base.skeleton.parameters()), whole)
    if key == "train" and config.train.trainable == "lora":  # the factors are added to the model
        factor = config.experts.rank * max(base.config.hidden_size, base.config.intermediate_size)
        return Model(whole, ((trained, world_size),), factor, reused + trained, fetched=fetched)
    if key == "train":
        copies = _kept(config) * trained / world_size * FP32 / base.dtype.itemsize
        return Model(whole - trained, ((trained, world_size),), largest, reused, copies)
    if key == "align":
        factors, dense = n["experts' factors"], n["gates and calibrations"]
        hosted = factors / align.ep_size if align.ep_size else factors * len(config.axes) / len(config.expert_names)
        frozen = whole + buffers(config, base)
        if align.expert_lr_scale == 0:
            return Model(frozen + hosted, ((dense, world_size),), dense, reused + hosted + dense, fetched=fetched)
        stack = hosted / (2 * len(base.layers))  # two of a layer's stacks are large
        groups = ((dense, world_size), (hosted, world_size // (align.ep_size or 1)))
        return Model(frozen, groups, stack, reused + hosted + dense, fetched=fetched)
    settings, copies = getattr(config.baselines, key.removeprefix("baselines.")), n["full copies of the FFNs"]
    if settings.expert_lr_scale == 0:
        return Model(whole - ffn + copies, (), 0)
    return Model(whole - ffn, ((copies, world_size),), largest, copies=copies if settings.drift > 0 else 0)


def _kept(config: RunConfig) -> int:
    """fp32 numbers that all ranks together hold of each trained one, to keep what was learned before."""
    settings = [config.train.keep]
    settings += [config.baselines.sequential_regularised] if REGULARISED in config.baselines.make else []
    return max((3 + (len(config.axes) - 1 if s.collision else 0) for s in settings if s.is_on), default=0)


@dataclass(frozen=True)
class Held:
    """Bytes of one rank."""

    stage: int  # of ZeRO
    parameters: float
    optimizer: float  # fp32 weights and Adam's states
    held: float  # gradients, when a forward pass begins,
    gradients: float  # and when a step's backward passes are done
    gathered: float  # whole parameters under ZeRO-3, when the loss is computed,
    fetched: float  # and with a copy, when a forward pass begins
    bucket: float  # that gradients are collected in
    reduced: float  # a copy of what is in it
    several: bool  # whether one bucket is not enough for all gradients
    step: float  # copies that the optimizer's step makes
    in_ram: float  # offloaded


@dataclass(frozen=True)
class Zero:
    """What of a stage's filled DeepSpeed JSON decides how much memory it takes."""

    stage: int
    size: int  # bytes of a number of the model
    world_size: int
    accumulates: bool
    fused: bool  # Adam
    on_gpu: bool  # CUDA reserves buffers at once, a CPU as they are written
    settings: Mapping[str, Any]  # zero_optimization

    @classmethod
    def of(
        cls, config: RunConfig, base: BaseModel, key: str, stage: OptimizerConfig, world_size: int, *, on_gpu: bool
    ) -> Zero:
        """Raises ConfigError as `engine.read_template`."""
        plan = engines.Plan.of(stage, config.model.dtype, 1)
        template = engines.read_template(stage.deepspeed, f"{key}.deepspeed")
        settings = engines.fill(template, plan, world_size, base.config.hidden_size)["zero_optimization"]
        params = template.get("optimizer", {}).get("params", {})
        asked = params.get("fused", engines.AUTO) if params.get("torch_adam", True) else True
        fused, size = on_gpu if asked == engines.AUTO else bool(asked), base.dtype.itemsize
        return cls(settings["stage"], size, world_size, stage.accumulation > 1, fused, on_gpu, settings)

    def _setting(self, name: str, default: float) -> float:
        """Under either of its two names."""
        return float(self.settings.get(f"stage3_{name}", self.settings.get(name, default)))

    def _offloads(self, name: str) -> bool:
        block = self.settings.get(name)
        return isinstance(block, dict) and block.get("device", "none") != "none"

    def holds(self, model: Model) -> Held:
        """What it holds of this model."""
        three, trained, own, size = self.stage == 3, model.trained, model.own, self.size
        parameters = size * (model.frozen + trained) / (self.world_size if three else 1)
        optimizer, step = FP32 * own * (1 + ADAM_STATES), self._step(model)
        gradients, held = (size * numbers for numbers in self._gradients(model))
        gathered, fetched = self._gathered(model)
        numbers, in_ram = self._setting("reduce_bucket_size", BUCKET), 0.0
        if self._offloads("offload_optimizer"):
            in_ram = optimizer + FP32 * own + step + gradients + (0 if three else size * own)
            optimizer = step = gradients = held = 0
        if three and self._offloads("offload_param"):
            in_ram, parameters = in_ram + parameters, 0
        return Held(
            stage=self.stage,
            parameters=parameters + size * model.copies,
            optimizer=optimizer,
            held=held,
            gradients=gradients,
            gathered=gathered,
            fetched=fetched,
            bucket=self._bucket(numbers, trained),
            reduced=size * min(max(numbers, model.largest), trained),
            several=self.stage > 1 and trained > numbers,
            step=step,
            in_ram=in_ram,
        )

    def _gradients(self, model: Model) -> tuple[float, float]:
        """(numbers that stay until the optimizer's step, of them those that are there when a forward pass begins)."""
        if self.stage == 3:
            return model.own, model.own
        if self.stage == 1:  # reduced in the last micro batch
            return model.trained, model.trained if self.accumulates else 0
        # A parameter that lies on several partitions is whole in each.
        partition = min(model.trained, model.own + model.largest) if self.world_size > 1 else model.own
        return (2 * partition, partition) if self.accumulates else (partition, 0)

    def _step(self, model: Model) -> float:
        """Bytes: a group's gradients in a line and in fp32, and what Adam makes of them."""
        numbers = max((n / ranks for n, ranks in model.groups), default=0)
        freed = 0.0 if self.stage == 3 else self.size * numbers
        if self.stage == 3:
            numbers = min(numbers, self._setting("sub_group_size", SUB_GROUP))
        flat = self.size * numbers + (FP32 * numbers if self.size < FP32 else 0)
        return max(flat, FP32 * numbers * (1 + (0 if self.fused else ADAM_COPIES)) - freed)

    def _bucket(self, numbers: float, trained: float) -> float:
        """Bytes of the buffer for so many numbers. Where it is not reserved, ZeRO-1's gradients move into it."""
        if not self.settings.get("contiguous_gradients", True):
            return 0
        both = 2 if self.stage < 3 and self.settings.get("overlap_comm") else 1
        written = min(numbers, trained) if self.stage > 1 else 0
        return self.size * both * (numbers if self.on_gpu else written)

    def _gathered(self, model: Model) -> tuple[float, float]:
        """`Held.gathered` and `fetched`.

        Every module that runs prefetches more, up to the limit of live parameters. Those that the backward pass uses
        again soon stay beyond it: at the end of the forward pass a layer is as far behind as it is ahead. A rank alone
        reads its shards themselves.
        """
        if self.stage < 3 or (self.world_size == 1 and not self._offloads("offload_param")):
            return 0, 0
        largest = max(model.largest, model.fetched)
        whole, ahead = model.frozen + model.trained, self._setting("prefetch_bucket_size", PREFETCH) + largest
        live = min(whole, self._setting("max_live_parameters", LIVE) + ahead)
        near = min(model.reused, self._setting("max_reuse_distance", DISTANCE) / 2 + ahead)
        return self.size * max(live, near), 2 * self.size * min(whole, ahead)
