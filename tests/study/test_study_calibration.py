"""Calibration: agreement with the run's report, cross-fitted temperatures, and reliability diagrams."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignx_ds.data.rows import Row
from alignx_ds.routing.gate_terms import sum_of
from alignx_ds.routing.metrics import expected_calibration_error, router_metrics
from alignx_ds.study.calibration import (
    calibrated,
    cross_fitted,
    forecasts,
    halves,
    multiple_choice,
    reliability,
    same_for_all,
)
from alignx_ds.study.gate_parts import GateTerms
from alignx_ds.study.studied_run import SYSTEMS, StudiedRun

Study = Callable[[str], dict[str, Any]]


def test_zero_shot_calibration_is_the_report_s(finished_run: Path, studied_run: StudiedRun, study: Study) -> None:
    router = study("calibration")["router"]
    report = json.loads((finished_run / "report.json").read_text())["router"]
    assert router["0"]["ece"] == pytest.approx(report["uncalibrated"]["ece"], abs=1e-5)
    assert router["0"]["ece_t"] == pytest.approx(report["ece"], abs=1e-5)
    assert router["0"]["brier_own"] == pytest.approx(report["brier"], abs=1e-5)
    assert router["0"]["ece_t"] == router["0"]["ece_t_refitted"]
    assert router["0"]["temperatures"]["own"] == router["3"]["temperatures"]["own"]
    assert router["0"]["nll_none"] != router["1"]["nll_none"] != router["3"]["nll_none"], "examples are seen"
    terms = GateTerms.of(studied_run.aligned(), studied_run)
    raw = router_metrics(sum_of(terms.held_out[terms.lowest]), terms.held_out_labels)
    assert router["0"]["brier_none"] == pytest.approx(raw["brier"], abs=1e-5)


def test_the_sources_are_the_report_s(finished_run: Path, study: Study) -> None:
    report = json.loads((finished_run / "report.json").read_text())["router"]["sources"]
    sources = study("calibration")["sources"]
    assert list(sources) == list(report) == ["generalist", "helpful", "harmless", "honest"]
    for name, found in sources.items():
        assert found["axes"].keys() == report[name]["axes"].keys()
        assert found["brier"] == pytest.approx(report[name]["brier"], abs=1e-5)


def test_answers_are_calibrated_for_every_system_and_number_of_examples(
    study: Study,
) -> None:
    content = study("calibration")
    assert set(content["answers"]) == set(SYSTEMS)
    for seen in content["answers"].values():
        assert list(seen) == ["0", "1", "3"]
        assert seen["0"]["nll_none"] != seen["1"]["nll_none"] != seen["3"]["nll_none"]
    assert content["rows"]["answers"]["held out"] == 16


@pytest.mark.parametrize("bins", [3, 15])
def test_the_reliability_diagram_s_mean_gap_is_the_ece(bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (500,), generator=generator)
    seen = reliability(*forecasts(logits, labels, "choice"), bins)
    assert sum(b["rows"] for b in seen) == 500
    gap = sum(b["rows"] / 500 * abs(b["confidence"] - b["accuracy"]) for b in seen)
    assert gap == pytest.approx(expected_calibration_error(logits.softmax(-1), labels, bins))


def test_a_temperature_corrects_overconfident_logits() -> None:
    """Labels drawn from softmax(logits / 3): that temperature is found, and the error goes."""
    generator = torch.Generator().manual_seed(1)
    logits = 6 * torch.randn(8000, 3, generator=generator, dtype=torch.float64)
    labels = (logits / 3).softmax(-1).multinomial(1, generator=generator).squeeze(1)
    refitted = cross_fitted(logits, labels, torch.arange(8000) % 2 == 0)
    found = calibrated(logits, labels, same_for_all(labels, 1.0), refitted)
    assert found["temperatures"]["refitted"] == pytest.approx([3.0, 3.0], rel=0.1)
    assert found["ece"] > 0.1 > 0.03 > found["ece_t_refitted"]
    assert found["ece_t"] == found["ece"], "its own temperature is the one that was given"
    assert found["brier_refitted"] < found["brier_none"]


def test_no_row_has_a_part_in_its_own_temperature() -> None:
    """One half is always right, which lowers a temperature; the other is always wrong, which raises it."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4, dtype=torch.float64)
    right = torch.tensor([True, False] * 4)
    made = cross_fitted(logits, torch.zeros(8, dtype=torch.long), right)
    assert made[right].min() > 10 > 0.1 > made[~right].max()


def test_halves_are_of_questions_whatever_their_order() -> None:
    asked = [("honest", Row(f"what is {n} ?", f"it is {n} .")) for n in range(30)]
    first = halves(asked)
    assert int(first.sum()) == 15
    assert torch.equal(halves(asked[::-1]), first.flip(0))


def test_choices_need_a_best_answer_and_a_wrong_one() -> None:
    whole = Row("q", "yes", incorrect=("no",))
    others = [Row("q", "", incorrect=("no",)), Row("q", "yes")]
    assert multiple_choice([("honest", row) for row in (whole, *others)]) == [("honest", whole)]
