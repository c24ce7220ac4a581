"""`alignx-ds study WHAT RUN_DIR RUN_DIR …`: the mean of a study over runs with several seeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignx_ds import cli
from alignx_ds.errors import DataError
from alignx_ds.study.command import STUDIES
from alignx_ds.study.results import PROVENANCE
from alignx_ds.study.seeds import Averaged, averaged, deviations, mean

Study = Callable[[str], dict[str, Any]]


def test_every_number_is_the_mean_and_has_its_sample_deviation() -> None:
    runs = [{"axes": ["a"], "n": 3, "scores": [{"a": value, "b": None}]} for value in (90.0, 93.0, 99.0)]
    found = averaged(runs)
    assert found == {"axes": ["a"], "n": 3, "scores": [{"a": 94.0, "b": None}]}
    score = found["scores"][0]["a"]
    assert score.deviation == pytest.approx(21**0.5)  # of −4, −1 and 5: √(42 / 2)
    assert f"{score:.1f}" == "94.0 ± 4.6"
    assert json.dumps(found["scores"]) == '[{"a": 94.0, "b": null}]'
    assert deviations(found) == {"scores": [{"a": score.deviation}]}


def test_a_mean_over_axes_is_taken_run_by_run() -> None:
    found = averaged([{"a": 90.0, "b": 70.0, "c": 100.0}, {"a": 70.0, "b": 90.0, "c": 100.0}])
    over_axes = mean(found.values())
    assert isinstance(over_axes, Averaged)
    assert (over_axes, over_axes.deviation) == (pytest.approx(260 / 3), 0.0)  # though two axes have one of 14.1
    assert mean([1.0, 2.0]) == 1.5 and not isinstance(mean([1.0, 2.0]), Averaged)


def test_a_number_that_some_run_lacks_has_no_mean() -> None:
    assert averaged([{"lost": None}, {"lost": 2.0}]) == {"lost": None}


def test_whole_numbers_that_differ_have_a_mean_and_alike_ones_stay_whole() -> None:
    found = averaged([{"refused": 80, "k": 2}, {"refused": 81, "k": 2}])
    assert found == {"refused": 80.5, "k": 2} and isinstance(found["k"], int)
    assert isinstance(found["refused"], Averaged)


def test_prompts_in_a_plane_are_the_first_run_s() -> None:
    found = averaged([{"pca": {"base": [[0.0, 1.0]]}}, {"pca": {"base": [[2.0, 3.0], [4.0, 5.0]]}}])
    assert found == {"pca": {"base": [[0.0, 1.0]]}}


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ({"axes": {"a": "x"}}, {"axes": {"a": "y"}}, "axes.a"),
        ({"scores": {"a": 1.0}}, {"scores": {"b": 1.0}}, "scores"),
        ({"points": [1.0, 2.0]}, {"points": [1.0]}, "points"),
        ({"points": [True, 2.0]}, {"points": [False, 2.0]}, "points[0]"),
    ],
)
def test_runs_that_do_not_match_are_refused(first: dict[str, object], second: dict[str, object], where: str) -> None:
    with pytest.raises(DataError) as raised:
        averaged([first, second])
    assert f"the studies of the runs differ in {where}: give finished runs of one recipe" in str(raised.value)


def test_two_runs_are_studied_and_their_mean_is_written_and_drawn(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / f"seed-{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("checkpoints", "study"))
        report = json.loads((run / "report.json").read_text())
        report["systems"]["alignx"]["helpful"] = 40.0 + 20 * seed  # what the study takes from the run
        (run / "report.json").write_text(json.dumps(report))
    assert cli.main(["study", "ensembles", *map(str, runs), "--out", str(tmp_path / "mean")]) == 0
    assert "50.0 ± 14.1" in capsys.readouterr().out
    mean = json.loads((tmp_path / "mean" / "ensembles.json").read_text())
    assert mean["command"] == "alignx-ds study ensembles seed-0 seed-1"
    assert mean["run"]["alignx"]["helpful"] == 50.0
    assert mean["deviation"]["run"]["alignx"]["helpful"] == pytest.approx(200**0.5)
    assert {path.name for path in (tmp_path / "mean").iterdir()} == {f"ensembles.{e}" for e in ("json", "png", "pdf")}
    own = json.loads((runs[1] / "study" / "ensembles.json").read_text())
    assert own["run"]["alignx"]["helpful"] == 60.0 and "deviation" not in own


@pytest.mark.parametrize("what", STUDIES)
def test_every_study_s_mean_is_shown_and_drawn(what: str, study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    content = {key: part for key, part in study(what).items() if key not in PROVENANCE}
    mean_of_two = averaged([content, raised(content)])
    _, draw, show = STUDIES[what]
    capsys.readouterr()
    show(mean_of_two)
    assert " ± 0.7" in capsys.readouterr().out
    draw(mean_of_two)


def raised(content: Any) -> Any:
    """The same content, with every number that is no count higher by one."""
    if isinstance(content, dict):
        return {key: raised(part) for key, part in content.items()}
    if isinstance(content, list):
        return [raised(part) for part in content]
    return content + 1 if isinstance(content, float) else content


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["drift", "runs/a", "runs/b"], "--out: give a directory for the mean over the runs, e.g. --out runs/study"),
        (["drift", "runs/a", "train.lr=1"], "train.lr=1: only scaling-axes has settings"),
    ],
)
def test_arguments_that_fit_no_mean_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", *given]) == 2
    assert message in capsys.readouterr().err
