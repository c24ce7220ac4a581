"""The metrics of a training step as typed values, their mean over micro batches and ranks, and where they are logged.

Shapes: E experts, K confidence bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignx_ds.runtime import distributed

Losses = list[float | None]  # by optimizer step; None: the step was skipped, its loss or gradient was not finite
Evaluations = dict[int, float | None]  # loss on rows that are not trained on, by step; None: it was not finite
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
    terms: dict[str, Tensor] = field(default_factory=dict)  # the parts of the loss, unweighted scalars, to be logged
    router: Callable[[], RouterSums] | None = None  # called once the step is made: it waits for the device


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: means over its micro batches and all ranks."""

    loss: float
    terms: dict[str, float]
    router: RouterSums | None = None
    tokens: float = 0.0  # of all micro batches and ranks, without padding
    waited: float = 0.0  # seconds for the batches

    def scalars(self) -> dict[str, float]:
        """Loss and terms by name."""
        return {"loss": self.loss, **self.terms}


def step_metrics(
    parts: list[MicroBatchLoss], *, stop: bool, tokens: int = 0, waited: float = 0.0
) -> tuple[StepMetrics, bool]:
    """(means over this rank's micro batches and over all ranks, whether `stop` is true on any rank). Collective.

    `tokens` and `waited` are this rank's. One transfer from the device reads all losses and terms, and one all-reduce,
    in fp32, carries everything.
    """
    names, count = list(parts[0].terms), len(parts)
    scalars = torch.stack([t.detach().double() for part in parts for t in (part.loss, *part.terms.values())])
    losses, *columns = scalars.view(count, -1).T.tolist()
    sums = [part.router() for part in parts if part.router]
    router = [_mean(column) for column in zip(*(found.numbers() for found in sums), strict=True)]
    means = [sum(losses) / count, float(stop), float(tokens), waited, *map(_mean, columns), *router]
    numbers = iter(_mean_over_ranks(means))
    loss, stopping = next(numbers), next(numbers) > 0
    tokens_of_all, mean_wait = next(numbers) * distributed.world_size(), next(numbers)
    mean_terms = {name: next(numbers) for name in names}
    mean_sums = sums[0].with_numbers(numbers) if sums else None
    return StepMetrics(loss, mean_terms, mean_sums, tokens_of_all, mean_wait), stopping


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


def summed(values: Sequence[Tensor | int]) -> Tensor:
    """[n] fp64: each of the n values, summed over all ranks."""
    stacked = torch.stack([torch.as_tensor(v, device=distributed.device()).double() for v in values])
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(stacked)
    return stacked


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
