"""The merges' settings that are chosen: those with the lowest perplexity, of rows that no system is judged on."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.inputs import read_inputs
from alignx_ds.evaluation import tuned_merges
from alignx_ds.evaluation.tuned_merges import GRIDS, tuned
from alignx_ds.models.base import BaseModel


def test_the_best_settings_of_each_merge_are_chosen(
    tiny_config: RunConfig, world_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the model is the merge of two vectors of ones; the perplexity is lowest where that is 1."""
    c = tiny_config
    c.baselines.make = ["task_arithmetic", "ties", "h3fusion"]
    data = read_inputs(c, world_base).data
    seen: dict[str, Any] = {}

    def load(base: BaseModel, specialists: list[Path], merge: Any) -> float:
        return float(merge([torch.ones(10, 10), torch.ones(10, 10)], "w").mean())

    def perplexities(model: float, rows: Any, config: RunConfig, pad_id: int) -> dict[str, float]:
        seen["rows"] = rows
        return {"helpful": exp((model - 1) ** 2), "honest": exp(2 * (model - 1) ** 2)}

    monkeypatch.setattr(tuned_merges, "load_merged", load)
    monkeypatch.setattr(tuned_merges, "perplexity_by_axis", perplexities)
    monkeypatch.setattr(tuned_merges, "ROWS", 3)
    before = c.baselines
    found = tuned(c, world_base, data, [])
    assert (found.arithmetic_scale, found.ties_scale, found.ties_density) == (0.5, 1.0, 0.8)
    assert (found.dare_scale, found.dare_density) == (before.dare_scale, before.dare_density), "it is not made"
    assert before.ties_scale == 1.5 and before.arithmetic_scale == 0.85, "the recipe's own are as they were"
    rows = seen["rows"]
    assert {rows.experts.count(expert) for expert in (1, 2, 3)} == {3} and 0 not in rows.experts
    calibration = {example.ids for example in data.calibration_rows.examples}
    assert all(example.ids in calibration for example in rows.examples)


def test_every_setting_that_is_tried_is_one_of_the_recipe_s(tiny_config: RunConfig) -> None:
    assert all(hasattr(tiny_config.baselines, key) for grid in GRIDS.values() for key in grid)
