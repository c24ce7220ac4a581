"""How much memory a training stage takes of one rank: an estimate from its shapes, its rows and its DeepSpeed JSON.

`benchmarks/training_memory.py` measures it beside the estimate. What CUDA and NCCL take for themselves is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignx_ds.config.schema import RunConfig
from alignx_ds.models.base import BaseModel
from alignx_ds.plan import training
from alignx_ds.plan.zero import FP32, Held, Zero, model_of
from alignx_ds.stages.activations import activations
from alignx_ds.training.losses import MOST_LOGITS

LOGITS_COPIES = 3  # fp32 ones of what the loss takes at once: the logits, their logarithms and the gradient


@dataclass(frozen=True)
class Lengths:
    """Of a training row."""

    tokens: int
    learned: int  # tokens that the loss counts


Rows = Mapping[str, Sequence[Lengths]]  # by the key of a stage's settings in the recipe


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank, at most. Not all of them are there at once: see `peak`."""

    zero: Held
    kept: float  # activations, when the loss is computed,
    last: float  # when the backward pass has come to the last layer,
    layer: float  # and in one layer's backward pass, with a parameter's gradient
    instead: float | None  # what would be kept if the layers did not recompute; None: they do not
    logits: float
    on_gpu: bool

    @property
    def activations(self) -> float:
        return self.kept + self.layer

    @property
    def buckets(self) -> float:
        """For gradients, and for parameters that ZeRO-3 gathers."""
        return self.zero.bucket + self.zero.reduced + self.zero.gathered

    @property
    def peak(self) -> float:
        """The greatest of these moments: the first fetch, the loss, a layer's backward pass, the reduction of
        gradients, and the optimizer's step.

        Activations go while gradients and the bucket fill up. CUDA reserves both at once, a CPU as they are written.
        """
        z = self.zero
        lasting = z.bucket if z.stage == 3 else 0
        within = z.reduced if z.several else 0  # reduced in a layer's backward pass
        full = (z.gradients if z.several else z.held) + z.bucket
        moments = [
            z.held + lasting + z.fetched,
            z.held + lasting + z.gathered + self.kept + self.logits,
            (full + within if self.on_gpu else z.held + lasting) + z.gathered + self.activations,
            full + within + self.last + self.layer,
            full + z.reduced,
            z.gradients + z.bucket,
            z.gradients + lasting + z.step,
        ]
        return z.parameters + z.optimizer + max(moments)


def memory(config: RunConfig, base: BaseModel, rows: Rows, world_size: int, *, on_gpu: bool) -> dict[str, StageMemory]:
    """By the key of each training stage's settings. Where a stage's rows are not known, all are model.max_length long.

    Raises ConfigError for a DeepSpeed JSON that can't be read.
    """
    return {
        key: stage_memory(config, base, key, rows.get(key, ()), world_size, on_gpu=on_gpu)
        for key in training.stages(config)
    }


def stage_memory(
    config: RunConfig, base: BaseModel, key: str, rows: Sequence[Lengths], world_size: int, *, on_gpu: bool
) -> StageMemory:
    """Of the stage with the settings at `key`, for a micro batch of its longest rows."""
    stage, size = training.stages(config)[key], base.dtype.itemsize
    rows = rows or [Lengths(config.model.max_length, config.model.max_length)] * stage.batch
    lengths, of_batch = [row.tokens for row in rows], stage.batch // (world_size * stage.accumulation)
    learned = sum(sorted((row.learned for row in rows), reverse=True)[:of_batch])
    made = activations(config, base, key, stage, lengths, world_size)
    recompute, model = made.recompute(stage.checkpoint_activations), model_of(config, base, key, world_size)
    return StageMemory(
        zero=Zero.of(config, base, key, stage, world_size, on_gpu=on_gpu).holds(model),
        kept=made.inputs if recompute else made.kept,
        last=0 if recompute else made.layer,
        layer=made.gradients + (made.layer if recompute else 0) + size * model.largest,
        instead=made.kept if recompute else None,
        logits=_logits(base.config.vocab_size, size, learned),
        on_gpu=on_gpu,
    )


def _logits(vocabulary: int, size: int, learned: int) -> float:
    """Bytes that the language model's loss takes (`losses.forward_nll`)."""
    if learned * vocabulary <= MOST_LOGITS:
        return LOGITS_COPIES * FP32 * learned * vocabulary
    whole = 3 * size * learned * vocabulary  # the logits, the gradients of their pieces, and these joined
    return whole + LOGITS_COPIES * FP32 * MOST_LOGITS
