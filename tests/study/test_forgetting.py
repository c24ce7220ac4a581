"""Forgetting: the measured models are those of the run's report, and the checkpoints are the fine-tunes' own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignx_ds.errors import DataError
from alignx_ds.study.forgetting import forgetting, kept_checkpoints, restored
from alignx_ds.study.studied_run import StudiedRun

AXES = ["helpful", "harmless", "honest"]
Study = Callable[[str], dict[str, Any]]


def test_the_forgetting_matrix_is_of_the_models_that_the_run_judged(finished_run: Path, study: Study) -> None:
    content = study("forgetting")
    stages = {seen["name"]: seen for seen in content["stages"]}
    report = json.loads((finished_run / "report.json").read_text())
    same = {
        "base": "base",
        "after helpful": "helpful",
        "after honest": "sequential",
        "mixed": "mixed",
        "AlignX": "alignx",
    }
    for stage, system in same.items():
        for axis in AXES:
            assert stages[stage]["scores"][axis] == report["systems"][system][axis]
            assert stages[stage]["perplexity"][axis] == pytest.approx(report["perplexity"][system][axis], rel=1e-4)
    assert content["ends"] == [0, 4, 8, 12]


def test_the_last_checkpoint_of_a_stage_is_the_stage(study: Study) -> None:
    content = study("forgetting")
    sequence = {seen["step"]: seen for seen in content["along"]["sequential"]}
    assert list(sequence) == [0, 2, 4, 6, 8, 10, 12]
    for seen in content["stages"][:4]:
        assert sequence[seen["step"]]["perplexity"] == pytest.approx(seen["perplexity"], rel=1e-4)
    mixed = content["along"]["mixed"]
    assert [seen["step"] for seen in mixed] == [0, 2, 4, 6, 8, 10, 12]
    assert mixed[-1]["perplexity"] == pytest.approx(content["stages"][4]["perplexity"], rel=1e-4)
    assert mixed[1]["perplexity"] != pytest.approx(mixed[-1]["perplexity"], rel=1e-4)


def test_checkpoints_of_another_fine_tune_are_passed_over_and_damaged_ones_named(
    studied_run: StudiedRun, finished_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    moved = StudiedRun.open(copy)
    here = copy / "checkpoints" / "stage1"
    assert len(kept_checkpoints(moved, "helpful")) == 2
    shutil.copytree(here / "honest" / "step_00000004", here / "helpful" / "step_00000006")
    assert [p.name for p in kept_checkpoints(moved, "helpful")] == ["step_00000002", "step_00000004"]
    path = next((here / "helpful" / "step_00000002").glob("rank*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    with pytest.raises(DataError, match="differs from its manifest"):
        kept_checkpoints(moved, "helpful")


def test_a_checkpoint_replaces_just_what_was_trained(studied_run: StudiedRun) -> None:
    first, last = kept_checkpoints(studied_run, "helpful")
    base, early, late = (
        m.state_dict() for m in (studied_run.base_model(), restored(studied_run, first), restored(studied_run, last))
    )
    changed = {name for name in base if not torch.equal(base[name], late[name])}
    table = studied_run.base.table
    assert changed == {table.weight_name(layer, p) for layer in (3, 4) for p in ("gate", "up", "down")}
    assert all(not torch.equal(early[name], late[name]) for name in changed)


def test_a_checkpoint_that_two_ranks_wrote_is_read_whole(studied_run: StudiedRun, tmp_path: Path) -> None:
    whole = kept_checkpoints(studied_run, "helpful")[-1]
    (file,) = whole.glob("rank*.safetensors")
    tensors = load_file(file)
    for rank in (0, 1):
        share = {name: tensors[name] for name in sorted(tensors)[rank::2]}
        save_file(share, tmp_path / f"rank{rank}-000.safetensors")
    expected, found = restored(studied_run, whole).state_dict(), restored(studied_run, tmp_path).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_forgetting_is_the_best_before_the_end_less_the_end() -> None:
    assert forgetting([0.0, 90.0, 70.0, 40.0]) == 50.0
    assert forgetting([0.0, 10.0, 20.0, 90.0]) == -70.0, "what came last has gained"
