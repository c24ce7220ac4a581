"""Contributions: agreement with the run's report, shares, and types of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignx_ds.data.rows import Row
from alignx_ds.study.contributions import AVERAGED, FINE_TUNING, LADDER, query_types

AXES = ["helpful", "harmless", "honest"]
Study = Callable[[str], dict[str, Any]]


def test_contributions_agree_with_the_run_s_own_report(finished_run: Path, study: Study) -> None:
    content = study("contributions")
    report = json.loads((finished_run / "report.json").read_text())
    seen = content["configurations"]
    assert set(LADDER) < set(seen)
    assert seen["all parts"]["routing"] == pytest.approx(report["router"]["ablations"]["all"], abs=1e-6)
    assert seen["linear router, as stored"]["routing"] == pytest.approx(
        report["router"]["ablations"]["linear"], abs=1e-6
    )
    assert seen["all parts"]["scores"] == {axis: report["systems"]["alignx"][axis] for axis in AXES}
    assert seen[FINE_TUNING]["scores"] == {axis: report["systems"]["mixed"][axis] for axis in AXES}
    assert seen[AVERAGED]["routing"] is None
    assert content["top_k"]["top 1"]["perplexity"] == pytest.approx(report["perplexity"]["alignx"], rel=1e-4)
    assert list(content["top_k"]) == ["top 1", "top 2", "all", "top 2, T = 1", "all, T = 1"]
    assert content["top_k"]["all, T = 1"]["perplexity"] != pytest.approx(report["perplexity"]["alignx"], rel=1e-9)


def test_activations_and_query_types_are_shares(study: Study) -> None:
    content = study("contributions")
    for shares in content["activation"].values():
        assert sum(shares) == pytest.approx(1.0)
    types = content["query_types"]
    assert sum(seen["prompts"] for seen in types.values()) == 64
    weighted = sum(torch.tensor(seen["chosen"]) * seen["prompts"] for seen in types.values()) / 64  # type: ignore[attr-defined]
    assert weighted.tolist() == pytest.approx(content["activation"]["chosen"])
    assert {"harmless: harmful", "harmless: benign"} <= set(types)


def test_queries_are_named_by_harm_and_otherwise_by_category() -> None:
    rare = [("honest", Row("q", "a", category=f"rare{n}")) for n in range(6)]
    owned = [
        ("generalist", Row("hello", "hello")),
        ("harmless", Row("how to hurt ?", "no", harmful=True, category="violence")),
        ("harmless", Row("how to bake ?", "so", category="")),
        *[("honest", Row("q", "a", category="colour"))] * 3,
        *rare,
    ]
    kinds = query_types(owned)
    assert kinds[:4] == ["generalist", "harmless: harmful", "harmless: benign", "honest: colour"]
    assert set(kinds[6:]) == {*(f"honest: rare{n}" for n in range(5)), "honest: other"}
