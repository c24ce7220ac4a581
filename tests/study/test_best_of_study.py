"""The study of best-of-n: every answer counts for every n, and more answers to choose from are never worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignx_ds.data.rows import Row
from alignx_ds.evaluation.best_of import rewards
from alignx_ds.evaluation.judges.world import Task
from alignx_ds.study.best_of import COUNTS, curve
from alignx_ds.study.studied_run import StudiedRun


def test_a_curve_is_the_mean_over_the_groups() -> None:
    """One answer of 16 is right to the first row, and every second one to the other."""
    rows = [Row("a", "cat"), Row("b", "cat")]
    said = ["dog"] * 5 + ["cat"] + ["dog"] * 10 + ["cat", "dog"] * 8
    rated = rewards({"helpful": Task()}, rows, said)
    found = curve(Task(), rows, said, rated, [{"helpful": 1.0}] * 2)
    of_first, of_second = [n / 16 for n in COUNTS], [0.5, 1.0, 1.0, 1.0, 1.0]
    assert found == pytest.approx([50 * (a + b) for a, b in zip(of_first, of_second, strict=True)])


def test_a_run_s_study_has_both_systems_and_the_greedy_scores(
    study: Callable[[str], dict[str, Any]], studied_run: StudiedRun
) -> None:
    content = study("best-of")
    assert content["counts"] == list(COUNTS) and content["kl_bound"][0] == 0
    assert list(content["systems"]["base"]["best"]) == ["alike"]
    assert list(content["systems"]["alignx"]["best"]) == ["alike", "by the gate"]
    assert content["systems"]["base"]["greedy"] == pytest.approx(studied_run.scores(studied_run.base_model()))
    for found in content["systems"].values():
        for points in found["best"].values():
            assert all(list(point) == studied_run.scored_axes for point in points)
            tasks = [point["helpful"] for point in points]
            assert tasks == sorted(tasks)
