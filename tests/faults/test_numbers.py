"""NaN and infinite losses and gradients: detected at their step on every rank, with their rows; no weight changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Command, results
from recording import Record
from safetensors.torch import load_file


def poison(kind: str, job: str, step: int, **more: Any) -> dict[str, Any]:
    return {"rank": 1, "kind": kind, "job": job, "step": step, **more}


def losses(directory: Path) -> list[float | None]:
    return list(json.loads((directory / "manifest.json").read_text())["losses"])


def is_finite(directory: Path) -> bool:
    tensors = [t for file in directory.glob("*.safetensors") for t in load_file(file).values()]
    return bool(tensors) and all(bool(torch.isfinite(t).all()) for t in tensors)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("job", ["stage1/helpful", "stage2"])
@pytest.mark.parametrize("kind", ["nan loss", "infinite gradient"])
def test_the_run_stops_names_the_rows_and_can_go_on(
    kind: str,
    job: str,
    tmp_path: Path,
    undisturbed,  # type: ignore[no-untyped-def]
    record: Record,
) -> None:
    command, step = Command("align", tmp_path / "run"), 1 if kind == "infinite gradient" else 4
    ended = command.start(fault=poison(kind, job, step))
    assert ended.codes == [2, 2], ended.console
    assert f"is not finite at step {step}" in ended.console and "nonfinite=skip" in ended.console
    assert "Traceback" not in ended.console
    rows = [json.loads(line) for line in (command.output / f"nonfinite/{job}/step_{step:08d}.jsonl").open()]
    assert len(rows) == (4 if kind == "nan loss" else 8), "a loss identifies the rank, a gradient does not"
    if kind == "nan loss":
        assert {row["rank"] for row in rows} == {1}
    assert all(row["prompt"] and row["place"] for row in rows)
    assert rows[0]["place"] in ended.console
    ended = command.start()
    assert ended.well, ended.console
    assert f"{job}: resumes after step {step - 1}" in ended.console
    assert results(command.output) == results(undisturbed("align"))
    record("numbers", f"{kind} in {job}", "exit code 2 at its step, rows named and saved, the state before it kept")


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_step_can_be_skipped(dtype: str, tmp_path: Path, record: Record) -> None:
    settings = ("nonfinite=skip", f"model.dtype={dtype}", "align.expert_lr_scale=1")
    command = Command("align", tmp_path / "run", settings)
    cases = {"specialists/honest": ("infinite gradient", "stage1/honest"), "model": ("nan loss", "stage2")}
    for left, (kind, job) in cases.items():
        ended = command.start(fault=poison(kind, job, 3))
        assert ended.well, ended.console
        assert ended.console.count("the step is skipped") == 1
        assert [loss is None for loss in losses(command.output / left)] == [False, False, True, False, False, False]
        assert is_finite(command.output / left)
        shutil.rmtree(command.output / "model")
    record("numbers", f"nonfinite=skip, {dtype}, both stages", "the step is left out on every rank, weights finite")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_weights_that_are_past_saving_stop_the_run_under_either_policy(tmp_path: Path, record: Record) -> None:
    command = Command("specialists", tmp_path / "run", ("nonfinite=skip", "train.steps=16"))
    ended = command.start(fault=poison("nan loss", "stage1/helpful", 3, every=True))
    assert ended.codes == [2, 2], ended.console
    assert ended.console.count("the step is skipped") == 9
    assert "as at the 9 steps before" in ended.console
    record("numbers", "ten steps in a row that are not finite, nonfinite=skip", "exit code 2 at the tenth")
