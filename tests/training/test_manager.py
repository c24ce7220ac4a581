"""When a job's checkpoints are saved, what they record, and when they are removed: without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignx_ds.config.schema import CheckpointsConfig
from alignx_ds.training import checkpoints, randomness
from alignx_ds.training.manager import CheckpointManager

Saved = list[tuple[int, dict[str, Any]]]  # step and facts


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Saved:
    """What is saved, instead of files."""
    found: Saved = []

    def save(directory: Path, engine: Any, step: int, inputs: dict[str, Any], facts: dict[str, Any]) -> None:
        found.append((step, facts))

    monkeypatch.setattr(checkpoints, "save", save)
    return found


def manager(root: Path, **settings: Any) -> CheckpointManager:
    return CheckpointManager("stage1/helpful", {"lr": 0.1}, root, CheckpointsConfig(**settings), 7, lambda: "seed: 7")


def test_checkpoints_are_saved_at_every_nth_step(tmp_path: Path, saved: Saved) -> None:
    for step in range(1, 8):
        manager(tmp_path, every=3).after_step(None, [1.0] * step, now=False)
    assert [step for step, _ in saved] == [3, 6]


def test_a_job_that_stops_saves_at_any_step(tmp_path: Path, saved: Saved) -> None:
    for every in (0, 3):
        manager(tmp_path, every=every).after_step(None, [1.0] * 4, now=False)
        manager(tmp_path, every=every).after_step(None, [1.0] * 4, now=True)
    assert [step for step, _ in saved] == [4, 4]


def test_the_loss_of_a_checkpoint_is_the_mean_since_the_last_one(tmp_path: Path, saved: Saved) -> None:
    """Without skipped steps; the best checkpoint is chosen by it."""
    manager(tmp_path, every=3).save(None, [9.0, 9.0, 1.0, None, 3.0])
    manager(tmp_path, every=1).save(None, [9.0, None])
    assert [facts["loss"] for _, facts in saved] == [2.0, None]
    assert saved[0][1] == {"losses": [9.0, 9.0, 1.0, None, 3.0], "loss": 2.0, "config": "seed: 7"}


def test_without_a_checkpoint_the_generators_are_seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(randomness, "seed", seeds.append)
    assert manager(tmp_path).restore(None) == []
    assert seeds == [7]


def test_a_finished_job_removes_its_own_checkpoints_alone(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    mine, other = root / "stage1/helpful/step_00000002", root / "stage1/honest/step_00000002"
    for path in (mine, other):
        path.mkdir(parents=True)
    manager(root).finish()
    assert other.is_dir() and not mine.parent.exists()
    CheckpointManager("stage1/honest", {}, root, CheckpointsConfig(), 7).finish()
    assert not root.exists()
