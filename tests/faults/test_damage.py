"""Truncated, bit-flipped and missing files of checkpoints are detected, and the checkpoint before them is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Command, results
from recording import Record


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "rank1-000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(checkpoint: Path, name: str = "rank0-000.safetensors") -> None:
    file = checkpoint / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def flip_manifest(checkpoint: Path) -> None:
    """A digit of a loss: still JSON, still plausible."""
    file = checkpoint / "manifest.json"
    text = file.read_text()
    place = text.index(".", text.index('"losses"')) + 3
    file.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


def remove(checkpoint: Path) -> None:
    (checkpoint / "rng-1.safetensors").unlink()


DAMAGES = {"a file cut short": truncate, "a flipped bit": flip, "a digit of the manifest": flip_manifest,
           "a missing file": remove}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 5 of stage 2: checkpoints at 2 and 4."""
    command = Command("align", tmp_path_factory.mktemp("damage") / "run")
    ended = command.start(fault={"rank": 0, "kind": "kill", "job": "stage2", "step": 5})
    assert ended.codes[0] == -9, ended.console
    return command.output


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(
    name: str,
    stopped: Path,
    tmp_path: Path,
    undisturbed,  # type: ignore[no-untyped-def]
    record: Record,
) -> None:
    check(stopped, tmp_path, [4], DAMAGES[name], 2)
    record("damage", f"{name} in the newest checkpoint", "named in a warning, the one before it used")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_without_a_whole_checkpoint_the_job_starts_again(stopped: Path, tmp_path: Path, record: Record) -> None:
    check(stopped, tmp_path, [2, 4], flip, 0)
    record("damage", "every checkpoint damaged", "each named in a warning, the job starts again")


def check(stopped: Path, tmp_path: Path, steps: list[int], harm: Callable[[Path], None], expected: int) -> None:
    """Nothing that was damaged is used, everything that was not is, and the end is the same."""
    command = Command("align", tmp_path / "run")
    shutil.copytree(stopped, command.output)
    for step in steps:
        harm(command.output / f"checkpoints/stage2/step_{step:08d}")
    ended = command.start()
    assert ended.well, ended.console
    assert ended.console.count("this checkpoint is damaged") == len(steps)
    assert (f"stage2: resumes after step {expected}" in ended.console) == bool(expected)
    assert "stage2: resumes after step 4" not in ended.console
    whole = Command("align", tmp_path / "whole")
    shutil.copytree(stopped, whole.output)
    assert whole.start().well
    assert results(command.output) == results(whole.output)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_damaged_calibrators_are_fitted_again(stopped: Path, tmp_path: Path, record: Record) -> None:
    command = Command("align", tmp_path / "run")
    shutil.copytree(stopped, command.output)
    flip(command.output / "checkpoints/stage2/calibrators", "fitted.safetensors")
    ended = command.start()
    assert ended.well, ended.console
    assert "fitted again" in ended.console and "stage2: resumes after step 4" in ended.console
    record("damage", "a flipped bit in the fitted calibrators", "fitted again to the same bytes, the stage goes on")
