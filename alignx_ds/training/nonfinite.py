"""A step whose loss or gradient is not finite: its rows are saved, and it is skipped or ends the job."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignx_ds.data.batches import MicroBatch
from alignx_ds.errors import DataError
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed
from alignx_ds.training.metrics import Losses

MAX_IN_A_ROW = 10  # skipped steps; from there on the weights are at fault, not the rows


@dataclass(frozen=True)
class NonFiniteSteps:
    """The policy for such steps of one job. DeepSpeed has not applied them on any rank."""

    directory: Path | None = None  # where their rows are saved; None: nowhere
    skip: bool = False  # go on after such a step
    decode: Callable[[Sequence[int]], str] = repr  # token ids as text

    def handle(self, job: str, losses: Losses, suspects: list[MicroBatch], save: Callable[[], None]) -> None:
        """Name and save the rows of this job's last step, then return when it may be skipped.

        `losses` ends with the None of that step. `suspects` are this rank's micro batches whose rows may have caused
        it. `save` writes a checkpoint of the state before the step, from which the same command tries it again.
        Raises DataError when the policy is to stop, and at the 10th such step in a row. Collective.
        """
        step = len(losses)
        rows = [row for share in distributed.gather(self._rows(suspects)) for row in share]
        where = distributed.on_main(lambda: self._save_rows(step, rows))
        places = ", ".join(row["place"] or f"row {row['row']}" for row in rows[:3]) + (" …" if len(rows) > 3 else "")
        what = f"{job}: the loss or its gradient is not finite at step {step} ({places}){where}"
        in_a_row = next((i for i, loss in enumerate(reversed(losses)) if loss is not None), step)
        if in_a_row >= MAX_IN_A_ROW:
            raise DataError(f"{what}, as at the {in_a_row - 1} steps before; lower the learning rate")
        if not self.skip:
            save()
            raise DataError(f"{what}; look at those rows, lower the learning rate, or go on with nonfinite=skip")
        console.warn(f"{what}; the step is skipped")

    def _rows(self, suspects: list[MicroBatch]) -> list[dict[str, Any]]:
        return [
            {
                "rank": distributed.rank(),
                "row": number,
                "place": example.place,
                "prompt": self.decode(example.ids[: example.prompt_length]),
                "answer": self.decode(example.ids[example.prompt_length :]),
            }
            for part in suspects
            for number, example in zip(part.numbers, part.examples, strict=True)
        ]

    def _save_rows(self, step: int, rows: list[dict[str, Any]]) -> str:
        """Returns the end of a sentence that says where they are."""
        if self.directory is None:
            return ""
        path = self.directory / f"step_{step:08d}.jsonl"
        manifest.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return f", saved in {path}"
