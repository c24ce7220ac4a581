"""The study of ensembles: whose answers, what they cost, and beside which scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignx_ds.study.ensembles import Said
from alignx_ds.study.studied_run import StudiedRun

Study = Callable[[str], dict[str, Any]]


def test_costs_add_up() -> None:
    own = [Said(["a", "b"], 10, 4), Said(["a", "c"], 10, 6)]
    assert Said(["a", "b"], 30, 5).beside(own) == Said(["a", "b"], 50, 15)
    assert Said(["a", "b"], 10, 4).times(3) == Said(["a", "b"], 30, 12)


def test_a_run_s_study_has_every_ensemble_beside_the_report(
    study: Study, studied_run: StudiedRun, finished_run: Path
) -> None:
    content = study("ensembles")
    fused = [f"{name}, by {fuser}" for fuser in ("mixed", "AlignX") for name in ("instruct", "summary")]
    assert list(content["ensembles"]) == ["averaged logits", "averaged probabilities", "majority", *fused]
    report = json.loads((finished_run / "report.json").read_text())["systems"]
    assert list(content["run"]) == list(report)
    for name, scores in content["run"].items():
        assert scores == {axis: report[name][axis] for axis in studied_run.scored_axes}
    for found in content["ensembles"].values():
        assert all(0 <= found[axis] == found["details"][axis]["score"] <= 100 for axis in content["axes"])


def test_a_vote_costs_all_specialists_and_a_fuser_more(study: Study) -> None:
    found = study("ensembles")["ensembles"]
    assert found["majority"]["passes"] == pytest.approx(3) and found["majority"]["tokens"] == pytest.approx(3)
    for name, cost in found.items():
        assert ("instruct" in name or "summary" in name) == (cost["tokens"] > 4.5), name  # it reads three answers too
