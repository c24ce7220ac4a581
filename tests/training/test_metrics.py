"""Metrics of a step: their mean over micro batches, and what TensorBoard's files hold."""

from __future__ import annotations

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignx_ds.training.metrics import MicroBatchLoss, RouterSums, StepMetrics, step_metrics, tensorboard

SUMS = RouterSums(2.0, 3.0, [4.0, 5.0], [6.0, 7.0], [8.0, 9.0], [10.0, 11.0], [12.0, 13.0, 14.0], 15.0, 16.0)


def test_all_numbers_of_the_router_s_sums_are_averaged() -> None:
    other = SUMS.with_numbers(iter([number + 2 for number in SUMS.numbers()]))
    assert list(SUMS.numbers()) == [float(n) for n in range(2, 17)]
    parts = [
        MicroBatchLoss(torch.tensor(loss), {"lm": torch.tensor(loss)}, lambda sums=sums: sums)
        for loss, sums in ((1.0, SUMS), (4.0, other))
    ]
    metrics, stop = step_metrics(parts, stop=True, tokens=7, waited=0.5)
    mean = SUMS.with_numbers(iter([number + 1 for number in SUMS.numbers()]))
    assert metrics == StepMetrics(2.5, {"lm": 2.5}, mean, 7.0, 0.5) and stop
    assert metrics.router is not None and metrics.router.overconfidence == [13.0, 14.0, 15.0]


def test_a_job_that_resumes_overwrites_its_curve(tmp_path: Path) -> None:
    first = tensorboard(tmp_path / "stage1/helpful")
    for step in (1, 2, 3):
        first(step, {"loss": float(step)})
    second = tensorboard(tmp_path / "stage1/helpful")
    second(2, {"loss": 20.0})
    read = EventAccumulator(str(tmp_path / "stage1/helpful"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_a_logger_that_is_never_used_writes_nothing(tmp_path: Path) -> None:
    tensorboard(tmp_path / "stage1")
    assert not list(tmp_path.iterdir())
