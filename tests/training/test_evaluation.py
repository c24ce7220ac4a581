"""When an evaluation is due, which step was the best, when the job ends, and which rows a rank has: without a model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from alignx_ds.config.monitoring import EvaluateConfig
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.runtime import distributed
from alignx_ds.training.evaluation import Evaluation
from alignx_ds.training.metrics import Evaluations, MicroBatchLoss

NAN = float("nan")


class Engine:
    def eval(self) -> None: ...

    def train(self) -> None: ...


def evaluation(rows: int = 4, size: int = 2, values: tuple[float, ...] = (), **settings: Any) -> Evaluation:
    """Each of the `values` is the loss at the next evaluation."""
    examples = [Example((5, 6, 7), 1)] * rows
    steps = iter(values)
    now: list[float] = []

    def before(engine: Any, parts: Any) -> None:
        now[:] = [next(steps)]

    return Evaluation(
        EvaluateConfig(**settings),
        LabelledExamples(examples, [0] * rows),
        build=lambda part, scale: part,  # type: ignore[arg-type, return-value]
        loss=lambda engine, part: MicroBatchLoss(torch.tensor(now[0])),
        size=size,
        steps=7,
        before=before,
    )


def watched(found: Evaluation) -> tuple[Evaluations, int]:
    """The evaluations of a job, and the number of its steps."""
    for step in range(1, 8):
        found.after_step(Engine(), step)
        if found.is_over:
            return found.found, step
    return found.found, 7


def test_it_is_due_every_so_many_steps_and_after_the_last() -> None:
    assert watched(evaluation(values=(4.0, 3.0, 2.0), every=3)) == ({3: 4.0, 6: 3.0, 7: 2.0}, 7)
    assert watched(evaluation(values=(4.0,), every=100))[0] == {7: 4.0}


def test_the_job_ends_after_so_many_in_a_row_without_a_lower_loss() -> None:
    """An equal one is no better, nor is one that is not finite."""
    values = (4.0, 5.0, 3.0, 3.0, NAN, 1.0)
    found, last = watched(made := evaluation(values=values, every=1, patience=2))
    assert last == 5 and found == {1: 4.0, 2: 5.0, 3: 3.0, 4: 3.0, 5: None}
    facts = made.facts(last)
    assert (facts["best"], facts["lowest"], facts["kept"], facts["stopped"]) == (3, 3.0, 3, 5)
    assert made.note == "evaluation not finite at step 5, lowest 3.000 at step 3, "


def test_without_patience_it_makes_all_steps() -> None:
    found, last = watched(made := evaluation(values=(1.0, *[2.0] * 6), every=1, keep_best=False))
    assert last == 7 and len(found) == 7
    assert (made.facts(7)["best"], made.facts(7)["kept"], made.facts(7)["stopped"]) == (1, 7, None)


def test_a_job_whose_evaluations_are_never_finite_ends_too() -> None:
    _, last = watched(made := evaluation(values=(NAN,) * 7, every=1, patience=3))
    assert last == 3 and made.best is None and made.facts(3)["kept"] == 3


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 5, 8, 17])
def test_every_rank_makes_as_many_forward_passes_and_every_row_counts_alike(
    world: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ranks = evaluation(rows), []
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ranks.append(made._own(made._numbers()))
    assert len({len(parts) for parts in ranks}) == 1 and all(part for parts in ranks for part in parts)
    counts = Counter(number for parts in ranks for part in parts for number in part)
    assert sorted(counts) == list(range(rows)) and len(set(counts.values())) == 1
    assert max(len(part) for parts in ranks for part in parts) < 2 * made.size + 1
