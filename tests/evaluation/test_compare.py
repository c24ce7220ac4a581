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
from alignx_ds.evaluation.compare import Spread, read_report, summarise


def content(score: float, axes: tuple[str, ...] = ("helpful", "honest")) -> dict[str, Any]:
    scores = {axis: score + n for n, axis in enumerate(axes)}
    return {
        "systems": {name: scores | {"avg": score, "details": {}} for name in ("base", "alignx")},
        "collapse": {axis: {"specialist": 90.0, "sequential_loses": score, "alignx_keeps": 0.5} for axis in axes},
        "router": {"accuracy": score / 100, "ece": 0.1, "brier": 0.2, "nll": 0.3},
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


def test_runs_of_different_recipes_are_refused() -> None:
    other_system = content(2.0)
    other_system["systems"]["sequential"] = other_system["systems"]["base"]
    for other in (content(1.0, axes=("helpful",)), other_system):
        with pytest.raises(DataError, match="different systems or axes"):
            summarise([content(1.0), other])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"systems": {}, "collapse": {}, "router": {}}'])
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
    (line,) = [line for line in printed.splitlines() if "alignx" in line.split()]
    assert "15.0 ± 7.1" in line
    assert "helpful: sequential loses 15.0 ± 7.1 points" in printed
