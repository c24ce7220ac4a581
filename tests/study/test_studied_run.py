"""Which fine-tunes a study reads: this run's own, whatever earlier recipes have left in the same directory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignx_ds.errors import DataError
from alignx_ds.runs import manifest
from alignx_ds.study.studied_run import StudiedRun


def made_from(directory: Path, **inputs: Any) -> None:
    """Write the manifest that the directory would have if it had been made from these inputs."""
    content = manifest.read(directory)
    content["inputs"] |= inputs
    content["fingerprint"] = manifest.fingerprint(content["inputs"])
    (directory / manifest.NAME).write_text(manifest.sealed(content))


@pytest.fixture
def specialists(finished_run: Path, tmp_path: Path) -> Path:
    unused = shutil.ignore_patterns("checkpoints", "tensorboard", "answers", "verdicts", "likelihoods", "plots")
    return Path(shutil.copytree(finished_run, tmp_path / "run", ignore=unused)) / "specialists"


def test_leftovers_of_other_recipes_are_not_read(specialists: Path) -> None:
    for name in ("sequential_3_harmless", "kind"):
        shutil.copytree(specialists / "sequential_3_honest", specialists / name)
    studied = StudiedRun.open(specialists.parent)
    names = ["helpful", "harmless", "honest", "sequential_2_harmless", "sequential_3_honest", "mixed_3_honest"]
    assert [studied.fine_tune(name) for name in names] == [specialists / name for name in names]
    with pytest.raises(DataError, match="made by another run"):
        studied.fine_tune("kind")


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("sequential_3_honest", {"start": "the sequence in another order"}),
        ("sequential_3_honest", {"seed": 99}),
        ("mixed_3_honest", {"rows": [["helpful", "other rows"]]}),
        ("harmless", {"layers": [0]}),
    ],
)
def test_a_fine_tune_of_another_recipe_is_refused(specialists: Path, name: str, inputs: dict[str, Any]) -> None:
    made_from(specialists / name, **inputs)
    with pytest.raises(DataError, match=f"{name}: made by another run"):
        StudiedRun.open(specialists.parent)


def test_a_fine_tune_that_is_not_finished_is_refused(specialists: Path) -> None:
    (specialists / "mixed_3_honest" / manifest.NAME).unlink()
    with pytest.raises(DataError, match="mixed_3_honest: not there, or not finished"):
        StudiedRun.open(specialists.parent)


def test_every_system_of_the_run_is_there_with_the_scales_of_its_report(specialists: Path) -> None:
    studied = StudiedRun.open(specialists.parent)
    ours = ["base", *studied.axes, "sequential", "mixed", "alignx"]
    assert [system.name for system in studied.compared()] == ours
    made = replace(studied.config.baselines, make=["task_arithmetic"], tune=True, arithmetic_scale=0.5)
    report = specialists.parent / "report.json"
    content = json.loads(report.read_text())
    content["config"]["baselines"]["arithmetic_scale"] = 0.25  # as it was tuned
    report.write_text(json.dumps(content))
    run = replace(studied.run, config=replace(studied.config, baselines=made))
    merged = {system.name: system for system in replace(studied, run=run).compared()}["task_arithmetic"]
    weights = [
        model.state_dict() for model in (merged.load(), studied.base_model(), *map(studied.fine_tuned, ours[1:4]))
    ]
    for name in weights[1]:
        whole, base, *tuned = (state[name] for state in weights)
        torch.testing.assert_close(whole, base + 0.25 * sum(one - base for one in tuned), rtol=1e-4, atol=1e-5)
