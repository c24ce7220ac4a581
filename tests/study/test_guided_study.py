"""The study of value-guided decoding: which systems and ways, their costs, and what a judge's look-ahead can't lose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignx_ds.study import guided
from alignx_ds.study.guided import CANDIDATES, GREEDY, MIXED, OWN
from alignx_ds.study.studied_run import StudiedRun

Study = Callable[[str], dict[str, Any]]


def points(content: dict[str, Any], system: str, way: str) -> list[dict[str, Any]]:
    return [p for p in content["points"] if (p["system"], p["way"]) == (system, way)]


def test_a_run_s_study_has_every_system_and_way(study: Study, studied_run: StudiedRun) -> None:
    content = study("guided")
    found = [(p["system"], p["way"], p["k"]) for p in content["points"]]
    expected = [
        ("base", GREEDY, 1),
        *(("base", way, k) for way in (OWN, MIXED) for k in CANDIDATES),
        ("mixed", GREEDY, 1),
    ]
    assert found == [*expected, ("alignx", GREEDY, 1), *(("alignx", OWN, k) for k in CANDIDATES)]
    for point in content["points"]:
        assert point["scores"] == {axis: point["details"][axis]["score"] for axis in studied_run.scored_axes}
        assert point["seconds"] > 0
    (greedy,) = points(content, "base", GREEDY)
    assert greedy["scores"] == pytest.approx(studied_run.scores(studied_run.base_model()))


def test_a_pass_for_a_greedy_token_and_more_for_every_candidate(study: Study) -> None:
    content = study("guided")
    assert all(p["passes"] == 1 for p in content["points"] if p["way"] == GREEDY)
    for system, ways in guided.WAYS.items():
        for way in ways:
            cost = [p["passes"] for p in points(content, system, way)]
            assert cost == sorted(cost) and cost[0] > 1, (system, way)


def test_an_answer_that_is_right_stays_right(study: Study) -> None:
    """Of what a model completes itself one candidate goes on as before, so tasks that are done can't be lost again."""
    content = study("guided")
    for system in ("base", "alignx"):
        done = [p["scores"]["helpful"] for p in (*points(content, system, GREEDY), *points(content, system, OWN))]
        assert done == sorted(done)


def test_best_of_n_stands_beside_it_where_it_was_measured(finished_run: Path, tmp_path: Path, study: Study) -> None:
    content = study("best-of")
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    studied = StudiedRun.open(tmp_path / "run")
    assert guided._best_of(studied) == []
    (tmp_path / "run" / "study").mkdir()
    (tmp_path / "run" / "study" / "best-of.json").write_text(json.dumps(content))
    found = [p for p in guided._best_of(studied) if p["system"] == "base"]
    assert [p["passes"] for p in found] == content["counts"]
    assert [p["scores"] for p in found] == content["systems"]["base"]["best"]["alike"]
