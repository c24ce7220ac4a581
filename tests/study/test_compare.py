"""Several runs side by side: the spread is numpy's, and reports that do not belong together are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignx_ds import cli
from alignx_ds.errors import DataError
from alignx_ds.runs import manifest
from alignx_ds.study.compare import Spread, read_report, summarise


def content(score: float, axes: tuple[str, ...] = ("helpful", "honest"), judged: bool = True) -> dict[str, Any]:
    """A run's report, with judged axes or without."""
    scores = {axis: score + n for n, axis in enumerate(axes)} | {"avg": score} if judged else {}
    lost = {axis: {"specialist": 90.0, "sequential_loses": score, "alignx_keeps": 0.5} for axis in axes}
    return {
        "scored": list(axes) if judged else [],
        "systems": {name: scores | {"details": {}} for name in ("base", "alignx")},
        "perplexity": {name: dict.fromkeys(axes, score / 10 + n) for n, name in enumerate(("base", "alignx"))},
        "collapse": lost if judged else {},
        "router": {"accuracy": score / 100, "ece": 0.1, "brier": 0.2, "nll": 0.3},
        "sets": {},
        "ablations": {},
        "run": {"seed": int(score)},
    }


def finished(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "report.json").write_text(text)
    return directory


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6))
def test_mean_and_deviation_are_numpys(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert spread.deviation == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def test_one_run_has_no_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 0.0)


def test_every_system_axis_and_router_figure_is_summarised() -> None:
    table = summarise([content(10.0), content(20.0)])
    assert list(table) == ["base", "alignx", "router"]
    assert table["alignx"]["honest"] == Spread(16.0, pytest.approx(np.std([11, 21], ddof=1)))
    assert table["base"]["avg"].mean == 15.0
    assert table["router"]["accuracy"].mean == pytest.approx(0.15)
    assert table["base"]["helpful ppl"] == Spread(1.5, pytest.approx(np.std([1, 2], ddof=1)))
    assert table["alignx"]["honest ppl"].mean == 2.5
    assert list(table["base"]) == ["helpful", "honest", "avg", "helpful ppl", "honest ppl"]


def test_runs_without_judged_axes_are_compared_by_perplexity() -> None:
    table = summarise([content(10.0, judged=False), content(20.0, judged=False)])
    assert list(table["alignx"]) == ["helpful ppl", "honest ppl"]
    assert table["alignx"]["helpful ppl"].mean == 2.5


@pytest.mark.parametrize("metric", ["benign_served", "length_controlled"])
def test_what_stands_beside_the_scores_is_compared_where_it_is_measured(metric: str) -> None:
    runs = [content(10.0), content(20.0)]
    for run, served in zip(runs, (50.0, 70.0), strict=True):
        for system in run["systems"].values():
            system[metric] = served
    assert summarise(runs)["base"][metric].mean == 60.0


def test_runs_of_different_recipes_are_refused() -> None:
    other_system = content(2.0)
    other_system["systems"]["sequential"] = other_system["systems"]["base"]
    for other in (content(1.0, axes=("helpful",)), other_system, content(1.0, judged=False)):
        with pytest.raises(DataError, match="different systems or axes"):
            summarise([content(1.0), other])


def test_runs_with_different_extra_sets_are_refused() -> None:
    other = content(2.0) | {"sets": {"both": {"base": {"score": 1.0}}}}
    for pair in ([content(1.0), other], [other, content(1.0)]):
        with pytest.raises(DataError, match="different extra sets"):
            summarise(pair)


LACKING = json.dumps({k: v for k, v in content(1.0).items() if k != "perplexity"})  # as an older version wrote it


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"systems": {}, "collapse": {}, "router": {}}', LACKING])
def test_a_report_that_is_no_report_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(finished(tmp_path / "run", text))]) == 2
    assert str(tmp_path / "run" / "report.json") in capsys.readouterr().err


def test_a_run_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"report\.json: .*finished run"):
        read_report(tmp_path)


def test_the_terminal_shows_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished(tmp_path / f"seed{n}", json.dumps(content(score))) for n, score in enumerate((10.0, 20.0))]
    assert cli.main(["compare", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    scores, perplexities = [line for line in printed.splitlines() if "alignx" in line.split()]
    assert "15.0 ± 7.1" in scores
    assert "2.50 ± 0.71" in perplexities
    assert "router: accuracy 0.150 ± 0.071" in printed
    assert "helpful: sequential fine-tuning loses 15.0 ± 7.1 points" in printed


def test_the_terminal_shows_runs_without_judged_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "run", json.dumps(content(10.0, judged=False)))
    assert cli.main(["compare", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "2.00 ± 0.00" in printed and "loses" not in printed


def test_extra_sets_are_compared_by_kind_and_written_with_their_ablation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for n, score in enumerate((60.0, 80.0)):
        run = content(score)
        kinds = {"base": (70.0, 10.0), "honest": (90.0, 20.0), "alignx": (score, 40.0)}
        run["sets"]["both"] = {s: {"score": a, "kind/a": a, "kind/b": b} for s, (a, b) in kinds.items()}
        ablated = {"scores": {}, "sets": {"both": {"score": score - 5, "kind/a": 0.0, "kind/b": 99.0}}}
        run["ablations"]["no_output_calibration"] = ablated
        runs.append(finished(tmp_path / f"seed{n}", json.dumps(run)))
    assert cli.main(["compare", *map(str, runs), "--out", str(tmp_path / "all.json")]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", *"70.0 ± 14.1".split(), *"90.0 ± 0.0".split(), "honest", "0.78"] in lines
    assert ["b", *"40.0 ± 0.0".split(), *"20.0 ± 0.0".split(), "honest", "2.00"] in lines, (
        "an ablation does not compete"
    )
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["sets"]["both"]["no_output_calibration"]["score"]["mean"] == 65.0
    assert written["systems"]["alignx"]["avg"]["deviation"] == pytest.approx(np.std([60, 80], ddof=1))
    assert [run["seed"] for run in written["runs"]] == [60, 80]


def test_a_report_on_a_model_that_was_made_again_since_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = manifest.fingerprint({"seed": 1})
    run = finished(tmp_path / "run", json.dumps(content(10.0) | {"model": made}))
    (run / "model").mkdir()
    manifest.write(run / "model", {"seed": 1}, {})
    assert cli.main(["compare", str(run)]) == 0
    manifest.write(run / "model", {"seed": 2}, {})
    capsys.readouterr()
    assert cli.main(["compare", str(run)]) == 2
    assert "on another model than the one that is there now" in capsys.readouterr().err
