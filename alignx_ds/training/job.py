"""What the training loop needs to know of a job: its checkpoints, curve, evaluation, and policy for bad steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from alignx_ds.data.batches import MicroBatch
from alignx_ds.training.evaluation import Evaluation
from alignx_ds.training.manager import CheckpointManager
from alignx_ds.training.metrics import Losses, ScalarLogger, StepMetrics, no_log
from alignx_ds.training.nonfinite import NonFiniteSteps
from alignx_ds.training.speed import Cost


def _nothing(*_: Any) -> None:
    """For jobs that need nothing done."""


@dataclass(frozen=True)
class TrainingJob:
    """A job with a name alone writes nothing, and ends at a step that is not finite."""

    name: str
    checkpoints: CheckpointManager | None = None
    nonfinite: NonFiniteSteps = field(default_factory=NonFiniteSteps)
    log: ScalarLogger = no_log
    scalars: Callable[[StepMetrics], dict[str, float]] = StepMetrics.scalars  # what is logged of a step, beside speed
    cost: Cost | None = None  # of a token, for MFU
    at_start: Callable[[Any], None] = _nothing  # takes the engine, before any checkpoint is loaded into it
    evaluation: Evaluation | None = None
    before_step: Callable[[Any, list[MicroBatch]], None] = _nothing  # takes it and all micro batches of a step

    def evaluated(self, evaluation: Evaluation) -> TrainingJob:
        """The job with this evaluation, whose losses its checkpoints hold."""
        kept = self.checkpoints and replace(self.checkpoints, evaluations=evaluation.found)

        def at_start(engine: Any) -> None:
            self.at_start(engine)
            evaluation.at_start(engine)

        return replace(self, evaluation=evaluation, checkpoints=kept, at_start=at_start)

    def save(self, engine: Any, losses: Losses) -> None:
        """Write a checkpoint of the state after these steps, if this job has any. Raises DataError. Collective."""
        if self.checkpoints:
            self.checkpoints.save(engine, losses)
