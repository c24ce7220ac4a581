"""What a training job leaves besides its result: its curve, its checkpoints, and the rows of steps that went wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignx_ds.config.schema import CheckpointsConfig
from alignx_ds.data.batches import MicroBatch
from alignx_ds.errors import DataError, Stopped
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed
from alignx_ds.training import checkpoints, randomness

Scribe = Callable[[int, dict[str, float]], None]
KeeperOf = Callable[[str, dict[str, Any]], "Keeper"]  # of a job's name, and of what it is made from
PATIENCE = 10  # steps in a row that may be skipped: after that the weights, not the rows, are at fault


@dataclass(frozen=True)
class Keeping:
    """What all jobs of a run share."""

    checkpoints: Path
    nonfinite: Path
    settings: CheckpointsConfig
    policy: str  # stop or skip a step whose loss or gradient is not finite
    config: str  # resolved
    seed: int


def no_scribe(step: int, values: dict[str, float]) -> None:
    """For ranks and jobs without a curve."""


@dataclass
class Keeper:
    """Of one job. Without `keeping` nothing is written, and a step that is not finite stops the job."""

    name: str
    inputs: dict[str, Any] = field(default_factory=dict)
    keeping: Keeping | None = None
    scribe: Scribe = no_scribe
    describe: Callable[[Sequence[int]], str] = repr  # token ids as text, for the rows of a step that went wrong

    @property
    def directory(self) -> Path | None:
        return self.keeping.checkpoints / self.name if self.keeping else None

    def restore(self, engine: Any) -> list[float | None]:
        """Seed the job, or bring the engine to where its newest whole checkpoint left off: the losses so far."""
        if self.keeping is None or self.directory is None:
            return []
        found = checkpoints.newest(self.directory, self.inputs)
        if found is None:
            randomness.seed(self.keeping.seed)
            return []
        checkpoints.load(found, engine, self.keeping.seed)
        console.say(f"{self.name}: goes on after step {found.step}, from {found.path}")
        return found.losses

    def after_step(
        self, engine: Any, losses: list[float | None], values: dict[str, float], steps: int, stop: bool
    ) -> None:
        """Write the curve, and a checkpoint when one is due or `stop` asks for it. Raises Stopped. Collective."""
        step = len(losses)
        self.scribe(step, {name: value for name, value in values.items() if math.isfinite(value)})
        every = self.keeping.settings.every if self.keeping else 0
        if stop or (every and step % every == 0):
            self.save(engine, losses)
        if stop:
            raise Stopped(f"{self.name}, after step {step} of {steps}")

    def save(self, engine: Any, losses: list[float | None]) -> None:
        if self.keeping is None or self.directory is None:
            return
        settings, directory = self.keeping.settings, self.directory
        recent = [loss for loss in losses[-(settings.every or 1) :] if loss is not None]
        facts = {
            "losses": losses,
            "loss": sum(recent) / len(recent) if recent else None,
            "config": self.keeping.config,
        }
        checkpoints.save(directory, engine, len(losses), self.inputs, facts)
        distributed.on_main(lambda: checkpoints.prune(directory, settings.keep))

    def not_finite(self, engine: Any, losses: list[float | None], suspects: list[MicroBatch]) -> None:
        """The last step was not applied: name its rows and save them; go on, or save the state and stop. Collective."""
        step = len(losses)
        rows = [row for share in distributed.gather(self._rows(suspects)) for row in share]
        where = distributed.on_main(lambda: self._write_rows(step, rows))
        places = ", ".join(row["place"] or f"row {row['row']}" for row in rows[:3]) + (" …" if len(rows) > 3 else "")
        what = f"{self.name}: the loss or its gradient is not finite at step {step} ({places}){where}"
        in_a_row = next((i for i, loss in enumerate(reversed(losses)) if loss is not None), step)
        if self.keeping and self.keeping.policy == "skip" and in_a_row < PATIENCE:
            console.warn(f"{what}; the step is skipped")
            return
        if in_a_row < PATIENCE:  # the state before this step is sound: the same command may try it again
            self.save(engine, losses[:-1])
            raise DataError(f"{what}; look at those rows, lower the learning rate, or go on with nonfinite=skip")
        raise DataError(f"{what}, as at the {in_a_row - 1} steps before; lower the learning rate")

    def _rows(self, suspects: list[MicroBatch]) -> list[dict[str, Any]]:
        return [
            {
                "rank": distributed.rank(),
                "row": number,
                "place": example.place,
                "prompt": self.describe(example.ids[: example.prompt_length]),
                "answer": self.describe(example.ids[example.prompt_length :]),
            }
            for part in suspects
            for number, example in zip(part.numbers, part.examples, strict=True)
        ]

    def _write_rows(self, step: int, rows: list[dict[str, Any]]) -> str:
        if self.keeping is None:
            return ""
        path = self.keeping.nonfinite / self.name / f"step_{step:08d}.jsonl"
        manifest.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return f", saved in {path}"

    def finish(self) -> None:
        """The job's result is sealed: what it would go on from is of no more use. Collective."""
        if self.keeping and not self.keeping.settings.finished:
            distributed.on_main(self._remove)

    def _remove(self) -> None:
        assert self.keeping and self.directory
        shutil.rmtree(self.directory, ignore_errors=True)
        for parent in (self.directory.parent, self.keeping.checkpoints):
            with suppress(OSError):  # not empty: other jobs' are in it
                parent.rmdir()
