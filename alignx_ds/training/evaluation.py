"""The loss on rows that a job does not train on, measured while it trains: when it ends, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from alignx_ds.config.monitoring import EvaluateConfig
from alignx_ds.data.batches import MicroBatch
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.runtime import distributed
from alignx_ds.training.metrics import Evaluations, MicroBatchLoss, StepMetrics, summed


def _nothing(*_: Any) -> None:
    """For losses that need nothing done."""


@dataclass(frozen=True)
class Evaluation:
    """What a job is evaluated on, and what was found so far.

    `loss` is the loss that the job trains on. `at_start` and `before` are what it needs done before the first step, and
    before it is computed for all of this rank's micro batches.
    """

    settings: EvaluateConfig
    rows: LabelledExamples
    build: Callable[[tuple[int, ...], float], MicroBatch]  # takes the rows' numbers and the `lm_scale`
    loss: Callable[[Any, MicroBatch], MicroBatchLoss]
    size: int  # rows of a training micro batch
    steps: int  # of the whole job
    at_start: Callable[[Any], None] = _nothing
    before: Callable[[Any, list[MicroBatch]], None] = _nothing
    scalars: Callable[[StepMetrics], dict[str, float]] = StepMetrics.scalars
    found: Evaluations = field(default_factory=dict)  # also the record that the job's checkpoints hold

    @property
    def best(self) -> int | None:
        """The first step with the lowest loss."""
        finite = {step: loss for step, loss in self.found.items() if loss is not None}
        return min(finite, key=finite.__getitem__, default=None)

    @property
    def is_over(self) -> bool:
        """Whether so many evaluations in a row were no better that the job ends."""
        after = [step for step in self.found if step > (self.best or 0)]
        return 0 < self.settings.patience <= len(after)

    def after_step(self, engine: Any, step: int) -> dict[str, float]:
        """What is logged, where an evaluation is due. Collective."""
        if step % self.settings.every and step != self.steps:
            return {}
        metrics = self.measure(engine)
        self.found[step] = metrics.loss if math.isfinite(metrics.loss) else None
        return {f"evaluation/{name}": value for name, value in self.scalars(metrics).items()}

    @torch.no_grad()
    def measure(self, engine: Any) -> StepMetrics:
        """The loss and its terms as if all rows were one step's: means per answer token, or per row. Collective.

        Under ZeRO-3 and expert parallelism the ranks work together, so each makes as many forward passes.
        """
        numbers = self._numbers()
        tokens = sum(self.rows.examples[n].learned_length for n in numbers)
        own = self._own(numbers)
        parts = [self.build(part, len(numbers) / (len(part) * max(1, tokens))) for part in own]
        engine.eval()
        self.before(engine, parts)
        found = [self.loss(engine, part) for part in parts]
        engine.train()
        values = [torch.stack([v.detach().double() for v in (f.loss, *f.terms.values())]) for f in found]
        shares = [len(part) / len(numbers) for part in own]
        means = summed(list(torch.stack([s * v for s, v in zip(shares, values, strict=True)]).sum(0)))
        loss, *terms = means.tolist()
        return StepMetrics(loss, dict(zip(found[0].terms, terms, strict=True)))

    def _numbers(self) -> list[int]:
        """All rows, each as often as any other: where there are fewer rows than ranks, every rank still has one."""
        rows = len(self.rows.examples)
        return list(range(rows)) * math.ceil(distributed.world_size() / rows)

    def _own(self, numbers: list[int]) -> list[tuple[int, ...]]:
        """This rank's micro batches. They may have more rows than in training: no activations are kept."""
        world = distributed.world_size()
        count = world * max(1, len(numbers) // (world * self.size))
        return [tuple(numbers[n::count]) for n in range(distributed.rank(), count, world)]

    @property
    def note(self) -> str:
        """For people, after the loss of a step."""
        step, best = max(self.found, default=None), self.best
        if step is None:
            return ""
        value = "not finite" if (loss := self.found[step]) is None else f"{loss:.3f}"
        lowest = "" if best in (step, None) else f", lowest {self.found[best]:.3f} at step {best}"
        return f"evaluation {value} at step {step}{lowest}, "

    def facts(self, steps: int) -> dict[str, Any]:
        """For the manifest of a result after so many steps: all losses, and the step whose weights it has."""
        best = self.best
        return {
            "losses": [list(pair) for pair in self.found.items()],
            "best": best,
            "lowest": None if best is None else self.found[best],
            "kept": steps if best is None or not self.settings.keep_best else best,
            "stopped": steps if steps < self.steps else None,
        }
