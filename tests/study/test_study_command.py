"""`alignx-ds study`: what every study writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignx_ds import cli
from alignx_ds.errors import DataError
from alignx_ds.runs import manifest
from alignx_ds.study.results import finite
from alignx_ds.study.studied_run import StudiedRun

Study = Callable[[str], dict[str, Any]]
Snapshot = Callable[[Path], dict[str, bytes | None]]


@pytest.mark.parametrize(
    "what",
    [
        *("drift", "forgetting", "contributions", "calibration", "overlap", "steering", "best-of", "ensembles"),
        *("robustness", "guided", "sensitivity", "misalignment", "prompts"),
    ],
)
def test_a_study_records_its_provenance_and_does_not_change_the_run(
    what: str, finished_run: Path, study: Study, snapshot: Snapshot
) -> None:
    before = snapshot(finished_run)
    content = study(what)
    assert snapshot(finished_run) == before
    assert content["command"] == f"alignx-ds study {what} {finished_run.name}"
    assert {"date", "hardware", "seed"} <= set(content)
    assert {"python", "torch", "deepspeed", "transformers", "scikit-learn"} <= set(content["versions"])
    assert str(finished_run.parent) not in json.dumps(content)


def test_a_directory_that_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "drift", str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alignx-ds: error: RUN_DIR: got ") and "finished run" in line
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_its_baselines_is_refused(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "part", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "part" / "specialists" / "mixed_3_honest" / manifest.NAME).unlink()
    with pytest.raises(DataError, match="mixed_3_honest: not there, or not finished"):
        StudiedRun.open(tmp_path / "part")


@pytest.mark.parametrize("what", ["steering", "best-of", "ensembles", "guided", "sensitivity"])
def test_scores_need_a_free_judge(
    what: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(re.sub(r"judge: (task|safety|truth)", "judge: refusal", config.read_text()))
    assert cli.main(["study", what, str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alignx-ds: error: RUN_DIR: got ") and "a run with a judge of task, safety" in line
    assert not (tmp_path / "run" / "study").exists()


def test_results_that_can_t_be_written_are_refused_before_any_work(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli.main(["study", "drift", str(finished_run), "--out", str(tmp_path / "file" / "in")]) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_infinities_are_null_in_the_json() -> None:
    assert json.dumps(finite({"a": [float("inf"), 1.5], 3: float("nan")})) == '{"a": [null, 1.5], "3": null}'
