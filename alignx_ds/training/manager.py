"""The checkpoints of one training job: when one is written, which one it resumes from, and when they are removed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignx_ds.config.schema import CheckpointsConfig
from alignx_ds.runtime import console, distributed
from alignx_ds.training import checkpoints, randomness
from alignx_ds.training.metrics import Evaluations, Losses


@dataclass(frozen=True)
class CheckpointManager:
    """Of the job with this name, in a directory of that name below the run's `root`."""

    name: str  # e.g. stage1/helpful
    inputs: dict[str, Any]  # the job's provenance: a checkpoint that was made from other inputs is not used
    root: Path
    settings: CheckpointsConfig
    seed: int
    config: Callable[[], str] = str  # gives the resolved config, which is saved in every checkpoint
    evaluations: Evaluations | None = None  # saved and restored, and added to by the job; None: it is not evaluated

    @property
    def directory(self) -> Path:
        return self.root / self.name

    def restore(self, engine: Any) -> Losses:
        """Load the newest whole checkpoint into a fresh engine; without one, seed the random number generators.

        Returns the losses of the steps made so far. Collective.
        """
        found = checkpoints.newest(self.directory, self.inputs)
        if found is None:
            randomness.seed(self.seed)
            return []
        checkpoints.load(found, engine, self.seed)
        if self.evaluations is not None:
            self.evaluations.update(found.evaluations)
        console.say(f"{self.name}: resumes after step {found.step}, from {found.path}")
        return found.losses

    def after_step(self, engine: Any, losses: Losses, *, now: bool) -> None:
        """Save when a checkpoint is due, or `now` in any case. Raises DataError. Collective."""
        every = self.settings.every
        if now or (every and len(losses) % every == 0):
            self.save(engine, losses)

    def save(self, engine: Any, losses: Losses) -> None:
        """Write a checkpoint of the state after these steps, and remove those that are no longer needed.

        Raises DataError on all ranks when one of them can't write. Collective.
        """
        recent = [loss for loss in losses[-(self.settings.every or 1) :] if loss is not None]
        mean = sum(recent) / len(recent) if recent else None
        facts: dict[str, Any] = {"losses": losses, "loss": mean, "config": self.config()}
        if self.evaluations is not None:
            found = self.evaluations
            facts |= {"evaluations": [*map(list, found.items())], "evaluation": found.get(len(losses))}
        checkpoints.save(self.directory, engine, len(losses), self.inputs, facts)
        distributed.on_main(lambda: checkpoints.prune(self.directory, self.settings.keep))

    def load_best(self, engine: Any, step: int) -> None:
        """Load the checkpoint after this step, which was the best. Raises DataError where it is damaged. Collective."""
        found = checkpoints.at(self.directory, step)
        checkpoints.load(found, engine, self.seed)

    def finish(self) -> None:
        """Remove the checkpoints, unless the recipe keeps them: the job's result is complete. Collective."""
        if not self.settings.finished:
            distributed.on_main(self._remove)

    def _remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        for parent in (self.directory.parent, self.root):
            with suppress(OSError):  # not empty: it holds other jobs' checkpoints
                parent.rmdir()
