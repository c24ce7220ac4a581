"""Every world size is started once a session, at its first use; its jobs' results are kept for all tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RanksError, start

JOBS = {
    1: (
        *("steps", "paths", "fine_tune", "lora", "whole", "interrupted", "streamed"),
        *("whole_stage", "fusions", "freed", "objectives", "keeping", "restoring", "evaluated"),
    ),
    2: (
        *("parity", "imbalanced", "lockstep", "steps", "paths", "untrained", "jsons", "rehearsed", "sharded"),
        *("fine_tune", "lora", "whole", "interrupted", "streamed", "whole_stage", "fusions", "freed"),
        *("objectives", "keeping", "restoring", "evaluated"),
    ),
    4: ("parity", "lockstep", "steps", "fine_tune"),
}
TIMEOUT = 600.0  # seconds for all jobs of a world size, also on a busy machine


@dataclass
class Runs:
    """What the ranks of each world size have left in `root`."""

    root: Path
    failures: dict[int, str] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)

    def of(self, world: int, job: str) -> list[Any]:
        """The job's result of every rank."""
        if world not in self.started:
            self.started.add(world)
            try:
                with_launcher = world == 2
                logs = self.root / f"logs{world}"
                worker = Path(__file__).with_name("worker.py")
                start(worker, world, str(self.root), *JOBS[world], logs=logs, timeout=TIMEOUT, launcher=with_launcher)
            except RanksError as failure:
                self.failures[world] = str(failure)
        files = [self.root / f"{job}.{rank}.{world}.pt" for rank in range(world)]
        if not all(file.is_file() for file in files):
            pytest.fail(f"{job} on {world} ranks: {self.failures.get(world)}", pytrace=False)
        return [torch.load(file, weights_only=False) for file in files]
