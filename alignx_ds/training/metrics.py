"""The metrics of a training step as typed values, their mean over micro batches and ranks, and where they are logged.

Shapes: E experts, K confidence bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignx_ds.runtime import distributed

Losses = list[float | None]  # by optimizer step; None: the step was skipped, its loss or gradient was not finite
ScalarLogger = Callable[[int, dict[str, float]], None]  # takes the optimizer step and the values by name


@dataclass(frozen=True)
class RouterSums:
    """Sums over the routing decisions of a micro batch. A decision is one gate's, about one row's prompt.

    They are sums, not means, so that ratios of their averages over micro batches and ranks are those of all rows.
    """

    decisions: float  # how many
    entropy: float  # nats, of the gates' probabilities
    gates: list[float]  # [E] probability of each expert
    chosen: list[float]  # [E] decisions that chose it
    rows: list[float]  # [E] decisions about rows that need the expert
    own: list[float]  # [E] those of them that chose it
    overconfidence: list[float]  # [K] confidence minus correctness
    slots: float  # places for tokens in the expert-parallel dispatch of all layers; 0 without one
    empty_slots: float  # those of them that held no token

    def numbers(self) -> Iterator[float]:
        """All values, in the order of the fields."""
        for f in fields(self):
            value = getattr(self, f.name)
            yield from value if isinstance(value, list) else [value]

    def with_numbers(self, numbers: Iterator[float]) -> RouterSums:
        """The same shape with other values, taken in the order of `numbers()`."""

        def taken(value: float | list[float]) -> float | list[float]:
            return [next(numbers) for _ in value] if isinstance(value, list) else next(numbers)

        values: dict[str, Any] = {f.name: taken(getattr(self, f.name)) for f in fields(self)}
        return RouterSums(**values)


@dataclass(frozen=True)
class MicroBatchLoss:
    """What a stage's loss function returns for one micro batch."""

    loss: Tensor  # scalar, with its graph; already scaled so that its mean over ranks and micro batches is the step's
    terms: dict[str, float] = field(default_factory=dict)  # the parts of the loss, unweighted, to be logged
    router: RouterSums | None = None


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: means over its micro batches and all ranks."""

    loss: float
    terms: dict[str, float]
    router: RouterSums | None = None

    def scalars(self) -> dict[str, float]:
        """Loss and terms by name."""
        return {"loss": self.loss, **self.terms}


def step_metrics(parts: list[MicroBatchLoss], *, stop: bool) -> tuple[StepMetrics, bool]:
    """(means over this rank's micro batches and over all ranks, whether `stop` is true on any rank). Collective.

    One all-reduce, in fp32, carries everything.
    """
    first, count = parts[0], len(parts)
    terms = [_mean([part.terms[name] for part in parts]) for name in first.terms]
    router = [_mean(column) for column in zip(*(p.router.numbers() for p in parts if p.router), strict=True)]
    loss = sum(float(part.loss.detach()) for part in parts) / count
    numbers = iter(_mean_over_ranks([loss, float(stop), *terms, *router]))
    mean_loss, stopping = next(numbers), next(numbers) > 0
    mean_terms = {name: next(numbers) for name in first.terms}
    return StepMetrics(mean_loss, mean_terms, first.router.with_numbers(numbers) if first.router else None), stopping


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(value / len(listed) for value in listed)


def _mean_over_ranks(values: list[float]) -> list[float]:
    if distributed.world_size() == 1:
        return values
    stacked = torch.tensor(values, device=distributed.device())
    torch.distributed.all_reduce(stacked)
    means: list[float] = (stacked / distributed.world_size()).tolist()
    return means


def no_log(step: int, values: dict[str, float]) -> None:
    """For ranks and jobs without a curve."""


def tensorboard(directory: Path) -> ScalarLogger:
    """Writes curves to TensorBoard files in this directory, on rank 0 alone.

    The file is opened at the first call: a job that resumes drops what an earlier start wrote from that step on.
    """
    if not distributed.is_main():
        return no_log
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def log(step: int, values: dict[str, float]) -> None:
        if not writers:
            writers.append(SummaryWriter(str(directory), purge_step=step))
        for name, value in values.items():
            writers[0].add_scalar(name, value, step)
        writers[0].flush()

    return log
