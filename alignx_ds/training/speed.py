"""How fast a job trains: tokens per second, the share of the device's peak (MFU), and what a step waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from alignx_ds.data.batches import MicroBatch
from alignx_ds.runtime import distributed, memory
from alignx_ds.training.metrics import StepMetrics

T = TypeVar("T")
NOMINAL = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s of dense bf16, as the vendor states it


def peak_flops(dtype: torch.dtype, given: float = 0.0) -> float | None:
    """The peak FLOP/s of a rank's device: the `given` number of TFLOP/s, or else the vendor's for bf16, where known."""
    if given:
        return given * 1e12
    if dtype != torch.bfloat16 or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(distributed.device())
    return next((rate for card, rate in NOMINAL.items() if card in name), None)


@dataclass(frozen=True)
class Cost:
    """What MFU is made of: the FLOPs that a token needs, forward and backward, and a device's peak FLOP/s, if known."""

    flops: float
    peak: float | None


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order; each is made by a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1, "batches") as thread:
        end = object()
        waiting = thread.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


@dataclass
class Stopwatch:
    """Times the optimizer steps of a job, from the request for a step's batches to the end of its update."""

    cost: Cost | None = None
    waited: float = 0.0  # seconds for the step's batches
    tokens: float = 0.0  # of all steps so far, over all ranks
    seconds: float = 0.0  # of all steps so far
    _started: float = field(default_factory=time.monotonic)

    def batches(self, steps: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """The micro batches of each step; what the caller does before it asks for more is the step."""
        steps = ahead(steps)
        while True:
            self._started = time.monotonic()
            parts = next(steps, None)
            self.waited = time.monotonic() - self._started
            if parts is None:
                return
            yield parts

    def step(self, metrics: StepMetrics) -> dict[str, float]:
        """What is logged of the step that has just ended, by name."""
        seconds = time.monotonic() - self._started
        self.tokens, self.seconds = self.tokens + metrics.tokens, self.seconds + seconds
        found = {
            "speed/step_seconds": seconds,
            "speed/tokens_per_second": metrics.tokens / seconds,
            "speed/data_wait_seconds": metrics.waited,
            "memory/peak_gib": memory.peak() / 2**30,
        }
        mfu = self._mfu(metrics.tokens / seconds)
        return found if mfu is None else found | {"speed/mfu": mfu}

    def note(self) -> str:
        """The mean over all steps so far, for people."""
        rate = self.tokens / self.seconds
        mfu = self._mfu(rate)
        return f"{rate:,.0f} tokens/s" + ("" if mfu is None else f", MFU {mfu:.1%}")

    def _mfu(self, rate: float) -> float | None:
        if self.cost is None or self.cost.peak is None:
            return None
        return rate * self.cost.flops / (self.cost.peak * distributed.world_size())


def own_tokens(parts: list[MicroBatch]) -> int:
    """This rank's tokens, without padding; the device is not asked."""
    return sum(len(example.ids) for part in parts for example in part.examples)
