"""`--gpu-memory`: which stages do not fit a GPU by the estimate, and which settings would make them fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import Problem
from alignx_ds.models.base import BaseModel
from alignx_ds.plan import training
from alignx_ds.plan.capacity import NEEDED
from alignx_ds.plan.memory import Lengths, Rows, stage_memory

FREE = 0.1  # of a GPU's memory: CUDA, NCCL, and gaps between blocks take some of it
MOST_RANKS = 1024
Change = Mapping[str, Any]  # values by dotted key


def problems(
    config: RunConfig, base: BaseModel, rows: Rows, world_size: int, memory: float, until: str = "run"
) -> Iterator[Problem]:
    """One for each stage whose peak is above what `memory` bytes of a GPU leave; `until` is the run's last step."""
    room = memory * (1 - FREE)
    needed = NEEDED.get(until)
    for key in training.stages(config):
        if needed and key not in ("scratch.train", *needed):
            continue
        stage = Fitted(config, base, key, rows.get(key, ()), world_size, room)
        if (peak := stage.peak({})) > room:
            change = stage.change()
            fix = "shorten model.max_length: no other setting that is known makes it fit"
            if change:
                settings = " ".join(f"{name}={value}" for name, value in change.items())
                fix = f"{settings} makes it {_gib(stage.peak(change))}"
            yield Problem(f"{key}, peak of a rank", _gib(peak), f"at most {_gib(room)} of {_gib(memory)}", fix)


@dataclass(frozen=True)
class Fitted:
    """A stage that is to fit into `room` bytes of every rank."""

    config: RunConfig
    base: BaseModel
    key: str
    rows: Sequence[Lengths]
    world_size: int
    room: float

    def change(self) -> Change:
        """The first settings, in order of what they cost in time and machines, with which it fits; {} for none."""
        made: list[Change] = []
        for change in self._changes():
            if self.peak(joined([*made, change])) < self.peak(joined(made)):
                made.append(change)
            if self.peak(joined(made)) <= self.room:
                for one in list(made):  # without those that it fits without
                    fewer = [other for other in made if other is not one]
                    made = fewer if self.peak(joined(fewer)) <= self.room else made
                return joined(made)
        return {}

    def _changes(self) -> Iterator[Change]:
        key, stage = self.key, training.stages(self.config)[self.key]
        yield {f"{key}.checkpoint_activations": "true"}
        accumulation = stage.accumulation
        while (accumulation := 2 * accumulation) * self.world_size <= stage.batch:
            yield {f"{key}.accumulation": accumulation}
        if key == "align":
            yield {"align.ep_size": 0, "align.deepspeed": "ds_configs/zero3_gpu.json"}
        sharded = key in ("train", "align")
        yield {f"{key}.deepspeed": f"ds_configs/{'zero3' if sharded else 'zero2'}_offload.json"}
        ranks = self.world_size
        while (ranks := 2 * ranks) <= MOST_RANKS:
            yield {"launch.ranks": ranks}

    def peak(self, change: Change) -> float:
        """With these settings; infinite where the stage can't run with them."""
        config, ranks = copy.deepcopy(self.config), change.get("launch.ranks", self.world_size)
        for name, value in change.items():
            *path, last = name.split(".")
            setattr(reduce(getattr, path, config), last, value)
        if any(training.problems(config, ranks)):
            return math.inf
        return stage_memory(config, self.base, self.key, self.rows, ranks, on_gpu=True).peak


def joined(changes: Sequence[Change]) -> Change:
    """All of them; the last counts where a key occurs twice."""
    return {name: value for change in changes for name, value in change.items()}


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
