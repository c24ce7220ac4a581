"""The comparison of trainers: all of them have the same losses, as they train the same model on the same batches."""

from __future__ import annotations

from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
from processes import process_group

pytest.importorskip("trl")


@pytest.mark.parametrize("padded", [False, True])
def test_every_trainer_makes_the_same_steps(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainers as benchmark
    from suite import driven, training

    losses: dict[str, list[Any]] = {}
    steps, close = training.Trainee.steps, driven.Driven.close

    def kept(self: training.Trainee, *given: Any) -> list[float | None]:
        made = steps(self, *given)
        losses.setdefault("ours", []).extend(made)
        return made

    def closed(self: driven.Driven) -> None:
        close(self)
        losses[type(self.trainer).__name__] = [self.trainer.state.log_history[-1]["train_loss"]]

    monkeypatch.setattr(training.Trainee, "steps", kept)
    monkeypatch.setattr(driven.Driven, "close", closed)
    args: Any = SimpleNamespace(
        **{"shape": "tiny", "layers": 2, "vocabulary": 50, "device": "cpu", "dtype": "float32", "rank": 4},
        **{"batch": 4, "length": 24, "steps": 1, "repeats": 2, "zero": 2, "padded": padded},
    )
    with process_group():
        found = benchmark.measure(args)
    assert len(found["tokens"]) == 2
    names = (benchmark.OURS, benchmark.BARE, driven.TRAINER, driven.TRL)
    assert {name: len(rounds) for name, rounds in found["milliseconds"].items()} == dict.fromkeys(names, 2)
    means = {name: mean(values) for name, values in losses.items()}
    assert means["Trainer"] == pytest.approx(means["ours"], rel=1e-3)
    assert means["SFTTrainer"] == pytest.approx(means["Trainer"], rel=1e-4)
