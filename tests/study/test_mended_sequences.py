"""The regularised and the restored sequence: in the report of a run that lists them, and in the study of forgetting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from alignx_ds import cli
from alignx_ds.evaluation.compared import system_names
from alignx_ds.experts.task_vectors import read_task_vector
from alignx_ds.runs import manifest
from alignx_ds.study import forgetting
from alignx_ds.study.studied_run import StudiedRun

MADE = ("sequential_regularised_2_harmless", "sequential_regularised_3_honest")


@pytest.fixture(scope="module")
def mended(finished_run: Path, small_run: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, given again with both baselines: everything else is reused."""
    run = tmp_path_factory.mktemp("mended") / "run"
    shutil.copytree(finished_run, run)
    make = ("baselines.make=[sequential_regularised,restored]", "baselines.sequential_regularised.rows=4")
    assert cli.main(["run", "world", *small_run, *make, f"output={run}"]) == 0
    return run


def test_the_report_has_both_beside_the_unchanged_systems(mended: Path, finished_run: Path) -> None:
    report, before = (json.loads((place / "report.json").read_text()) for place in (mended, finished_run))
    assert {*report["systems"]} == {*before["systems"], "sequential_regularised", "restored"}
    assert {name: report["systems"][name] for name in before["systems"]} == before["systems"]
    assert {*report["systems"], *report["ablations"]} == {*system_names(StudiedRun.open(mended).config)}
    assert report["perplexity"]["sequential_regularised"] != report["perplexity"]["sequential"]
    assert all(name in (mended / "report.html").read_text() for name in (*MADE, "restored"))


def test_the_regularised_sequence_stays_nearer_to_its_start(mended: Path) -> None:
    first = read_task_vector(mended / "specialists/helpful", 3)
    moved = {}
    for name in ("sequential_2_harmless", MADE[0]):
        change = read_task_vector(mended / "specialists" / name, 3)
        moved[name] = sum(float((change[p] - first[p]).square().sum()) for p in first)
    assert 0 < moved[MADE[0]] < moved["sequential_2_harmless"]


def test_the_restored_one_is_the_best_of_its_rounds(mended: Path) -> None:
    facts = manifest.read(mended / "baselines/restored")
    made, start = (read_task_vector(mended / d, 3) for d in ("baselines/restored", "specialists/sequential_3_honest"))
    assert all(torch.equal(made[p], start[p]) for p in made) == (facts["chosen"] == 0)


def test_the_study_of_forgetting_measures_both(mended: Path) -> None:
    report = json.loads((mended / "report.json").read_text())
    points = {point.name: point for point in forgetting.stages(StudiedRun.open(mended))}
    assert list(points)[3:] == [
        "after honest",
        "regularised, after harmless",
        "regularised, after honest",
        "restored",
        "mixed",
        "AlignX",
    ]
    assert points["regularised, after honest"].step == points["after honest"].step == 12
    studied = StudiedRun.open(mended)
    for name, system in (("regularised, after honest", "sequential_regularised"), ("restored", "restored")):
        found = studied.perplexities(points[name].load())
        assert found == pytest.approx(report["perplexity"][system], rel=1e-4)
