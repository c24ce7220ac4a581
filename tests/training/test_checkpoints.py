"""Which checkpoint is used, and which are kept: on directories as a run leaves them, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignx_ds.errors import DataError
from alignx_ds.runs import manifest
from alignx_ds.training import checkpoints

INPUTS = {"seed": 0}


def leave(
    directory: Path, step: int, loss: float | None, inputs: dict[str, int] = INPUTS, **facts: float | None
) -> Path:
    path = directory / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "rank0-000.safetensors").write_bytes(bytes([step % 256]) * 64)
    manifest.write(path, inputs, {"step": step, "losses": [loss] * step, "loss": loss, **facts})
    return path


def steps(directory: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in directory.glob("step_*"))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0), (8, None), (10, 2.5)):
        leave(tmp_path, step, loss)
    checkpoints.prune(tmp_path, 2)
    assert steps(tmp_path) == [4, 8, 10]
    checkpoints.prune(tmp_path, 1)
    assert steps(tmp_path) == [4, 10]


def test_without_a_loss_only_the_newest_are(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        leave(tmp_path, step, None)
    checkpoints.prune(tmp_path, 1)
    assert steps(tmp_path) == [6]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "nowhere", INPUTS) is None


@pytest.mark.parametrize("name", ["rank0-000.safetensors", "manifest.json"])
def test_a_damaged_one_counts_no_more(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Or the next pruning would keep it in place of a whole one."""
    for step in (2, 4):
        leave(tmp_path, step, 1.0)
    file = tmp_path / "step_00000004" / name
    file.write_bytes(b"x" + file.read_bytes()[1:])
    found = checkpoints.newest(tmp_path, INPUTS)
    assert found is not None and found.step == 2 and found.losses == [1.0, 1.0]
    assert f"{file}: " in capsys.readouterr().err
    leave(tmp_path, 3, 2.0)
    checkpoints.prune(tmp_path, 1)
    assert steps(tmp_path) == [2, 3]
    assert (tmp_path / ".step_00000004.damaged").is_dir()


def test_those_of_other_inputs_are_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or they would be the newest for ever."""
    leave(tmp_path, 900, 0.1, {"seed": 1})
    leave(tmp_path, 100, 1.0)
    found = checkpoints.newest(tmp_path, INPUTS)
    assert found is not None and found.step == 100
    assert steps(tmp_path) == [100]
    assert (tmp_path / ".step_00000900.foreign").is_dir()
    assert "made from other inputs" in capsys.readouterr().err


def test_of_a_job_that_is_evaluated_the_first_with_the_lowest_evaluation_is_kept(tmp_path: Path) -> None:
    """Whatever its training loss, which may fall while the evaluation rises."""
    for step, evaluation in ((2, 3.0), (4, 1.0), (6, 1.0), (8, None), (10, 2.5)):
        leave(tmp_path, step, 1 / step, evaluation=evaluation)
    checkpoints.prune(tmp_path, 1)
    assert steps(tmp_path) == [4, 10]


def test_the_best_one_is_checked_before_its_weights_become_the_result(tmp_path: Path) -> None:
    path = leave(tmp_path, 4, 1.0)
    assert checkpoints.at(tmp_path, 4).step == 4
    (path / "rank0-000.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=f"rank0-000.*remove {tmp_path}, and the job trains anew"):
        checkpoints.at(tmp_path, 4)
    with pytest.raises(DataError, match=f"remove {tmp_path}"):
        checkpoints.at(tmp_path, 6)
