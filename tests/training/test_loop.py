"""The training loop on a stub of an engine: what it averages, logs, saves, skips and raises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import base_model
from torch import Tensor

from alignx_ds.data.batches import MicroBatch, collate
from alignx_ds.data.encode import Example
from alignx_ds.errors import DataError, Stopped
from alignx_ds.evaluation.decode import Decoder
from alignx_ds.runtime import signals
from alignx_ds.runtime.console import Progress
from alignx_ds.training.engine import Plan
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.loop import train
from alignx_ds.training.manager import CheckpointManager
from alignx_ds.training.metrics import Losses, MicroBatchLoss
from alignx_ds.training.nonfinite import MAX_IN_A_ROW, NonFiniteSteps
from alignx_ds.training.speed import Cost

PARTS = 2  # micro batches of a step
NAN = float("nan")


@dataclass
class Engine:
    """One weight. A step is not applied when a gradient since the last one is not finite, as with DeepSpeed."""

    weight: Tensor = field(default_factory=lambda: torch.ones((), requires_grad=True))
    applied: bool = True
    backwards: int = 0

    def train(self) -> None: ...

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.backwards += 1

    def step(self) -> None:
        if self.backwards % PARTS == 0:
            assert self.weight.grad is not None
            self.applied = bool(torch.isfinite(self.weight.grad))
            self.weight.grad = None

    def was_step_applied(self) -> bool:
        return self.applied

    def get_lr(self) -> list[float]:
        return [0.1]

    def get_global_grad_norm(self) -> float:
        return 3.0


@dataclass(frozen=True)
class Recorder(CheckpointManager):
    """Records what would be saved, and restores what it is given."""

    restored: Losses = field(default_factory=list)
    saved: list[Losses] = field(default_factory=list)

    def restore(self, engine: Any) -> Losses:
        return list(self.restored)

    def after_step(self, engine: Any, losses: Losses, *, now: bool) -> None:
        if now:
            self.save(engine, losses)

    def save(self, engine: Any, losses: Losses) -> None:
        self.saved.append(list(losses))


def recorder(restored: Losses | None = None) -> Recorder:
    from alignx_ds.config.schema import CheckpointsConfig

    return Recorder("job", {}, Path("nowhere"), CheckpointsConfig(), 0, restored=restored or [])


def micro_batch(number: int) -> MicroBatch:
    example = Example((5, 6, 7), 1, f"rows.json, row {number}")
    return MicroBatch(collate([example], 0), torch.zeros(1), torch.ones(1, 1), 1.0, (example,), (number,))


def run(values: list[list[float]], job: TrainingJob, engine: Engine | None = None) -> Losses:
    """Train for as many steps as there are lists; each number is the loss of a micro batch."""

    def batches(start: int) -> Iterator[list[MicroBatch]]:
        for step in range(start, len(values)):
            yield [micro_batch(PARTS * step + n) for n in range(PARTS)]

    def step_loss(engine: Engine, part: MicroBatch) -> MicroBatchLoss:
        step, n = divmod(part.numbers[0], PARTS)
        return MicroBatchLoss(values[step][n] * engine.weight, {"twice": torch.tensor(2 * values[step][n])})

    plan = Plan(1.0, PARTS, PARTS, len(values), 0, 0.0, 1.0, bf16=False)
    return train(engine or Engine(), batches, step_loss, plan, Progress(), job)


def test_a_step_s_loss_and_terms_are_means_of_its_micro_batches() -> None:
    logged = {}
    job = TrainingJob("job", log=logged.__setitem__)
    assert run([[1.0, 3.0], [5.0, 5.0]], job) == [2.0, 5.0]
    assert [of_loss(values) for values in logged.values()] == [
        {"loss": 2.0, "twice": 4.0},
        {"loss": 5.0, "twice": 10.0},
    ]


def of_loss(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if "/" not in name}


def test_every_step_logs_its_speed_and_its_optimizer_s_numbers() -> None:
    logged: dict[int, dict[str, float]] = {}
    run([[1.0, 1.0]] * 2, TrainingJob("job", log=logged.__setitem__, cost=Cost(flops=50.0, peak=1e6)))
    for values in logged.values():
        assert values["optimizer/lr"] == 0.1 and values["optimizer/gradient_norm"] == 3.0
        tokens = PARTS * 3  # of this step's rows
        assert values["speed/tokens_per_second"] == pytest.approx(tokens / values["speed/step_seconds"])
        assert values["speed/mfu"] == pytest.approx(values["speed/tokens_per_second"] * 50 / 1e6)
        assert 0 <= values["speed/data_wait_seconds"] <= values["speed/step_seconds"]
        assert values["memory/peak_gib"] > 0.01


def test_without_a_known_peak_there_is_no_mfu() -> None:
    logged: dict[int, dict[str, float]] = {}
    run([[1.0, 1.0]], TrainingJob("job", log=logged.__setitem__, cost=Cost(flops=50.0, peak=None)))
    assert "speed/mfu" not in logged[1]


def test_cudnn_s_attention_is_on_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run without gradients has too many shapes for it."""
    seen = []
    monkeypatch.setattr(Engine, "backward", lambda self, loss: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    monkeypatch.setattr(Engine, "step", lambda self: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        Decoder(base_model())
        run([[1.0, 1.0]], TrainingJob("job"))
        assert seen == [True] * PARTS
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_it_goes_on_after_the_steps_that_were_restored() -> None:
    engine = Engine()
    losses = run([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], TrainingJob("job", recorder([9.0, None])), engine)
    assert losses == [9.0, None, 3.0] and engine.backwards == PARTS


def test_a_request_to_stop_saves_the_step_that_was_just_made(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, logged = recorder(), {}
    monkeypatch.setattr(signals, "stop_requested", lambda: len(logged) == 1)  # it comes during the second step
    with pytest.raises(Stopped, match="job, after step 2 of 3"):
        run([[1.0, 1.0]] * 3, TrainingJob("job", manager, log=logged.__setitem__))
    assert manager.saved == [[1.0, 1.0]] and list(logged) == [1, 2]


def test_a_step_that_is_not_finite_ends_the_job_with_the_state_before_it(tmp_path: Path) -> None:
    manager = recorder()
    with pytest.raises(DataError, match=r"step 2 \(rows.json, row 3\).*nonfinite=skip"):
        run([[1.0, 1.0], [1.0, NAN], [1.0, 1.0]], TrainingJob("job", manager, NonFiniteSteps(tmp_path)))
    assert manager.saved == [[1.0]]
    (line,) = (tmp_path / "step_00000002.jsonl").read_text().splitlines()
    row = {"rank": 0, "row": 3, "place": "rows.json, row 3", "prompt": "(5,)", "answer": "(6, 7)"}
    assert json.loads(line) == row, "only the micro batch whose loss it was"


def test_such_a_step_may_be_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    logged = {}
    job = TrainingJob("job", nonfinite=NonFiniteSteps(skip=True), log=logged.__setitem__)
    assert run([[1.0, 1.0], [1.0, NAN], [3.0, 3.0]], job) == [1.0, None, 3.0]
    assert "the step is skipped" in capsys.readouterr().err
    assert of_loss(logged[2]) == {}, "a curve holds finite values only"


def test_too_many_in_a_row_end_the_job_though_they_may_be_skipped() -> None:
    manager = recorder()
    with pytest.raises(DataError, match="lower the learning rate"):
        run([[NAN, NAN]] * (MAX_IN_A_ROW + 1), TrainingJob("job", manager, NonFiniteSteps(skip=True)))
    assert not manager.saved
