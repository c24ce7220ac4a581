"""Interleaved timing: every round runs all systems, so that a change of the machine's speed affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

WARM_UP = 2  # rounds that are dropped


@dataclass(frozen=True)
class Work:
    """Work to be timed, and what is done before it, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        self.prepare()
        self.run()


@dataclass(frozen=True)
class Times:
    """Milliseconds of every round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return low, high

    def over(self, other: Times) -> float:
        """The median of the rounds' own ratios: disturbances of a whole round cancel."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def interleaved(
    work: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Times]:
    """Times by name. Every round starts with another system, so that none is always first.

    A round runs inside `turn()`, which may wait for other processes' rounds.
    """
    names = list(work)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + repeats):
        first = number % len(names)
        with turn():
            for name in names[first:] + names[:first]:
                rounds[name].append(milliseconds(work[name], device))
    return {name: Times(values[WARM_UP:]) for name, values in rounds.items()}


def milliseconds(work: Callable[[], object], device: str) -> float:
    """The time that `work` takes, until the device has finished it."""
    if isinstance(work, Work):
        work.prepare()
        work = work.run
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)
