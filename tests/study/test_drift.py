"""Drift: indices of every system at every layer, and shifts in units of the spread."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from alignx_ds.study import plotting
from alignx_ds.study.drift import LABELS, _bars, distance, moved
from alignx_ds.study.studied_run import SYSTEMS

AXES = ["helpful", "harmless", "honest"]
Study = Callable[[str], dict[str, Any]]


def test_drift_has_all_indices_of_all_systems_at_every_layer(study: Study) -> None:
    content = study("drift")
    assert content["prompts"] == dict.fromkeys(["generalist", *AXES], 16)
    for by_layer in content["indices"].values():
        assert list(by_layer) == ["3", "4"]
        assert all(list(by_layer[layer][name]) == list(LABELS) for layer in by_layer for name in SYSTEMS)
        assert all(by_layer[layer]["base"]["aqi"] == 0.5 for layer in by_layer)
    assert content["moved"]["alignx"]["generalist"] < min(content["moved"]["sequential"].values())
    assert list(content["distance"]) == [*AXES, "sequential", "mixed", "alignx"]
    shares = {name: content["distance"][name]["honest"] / found["honest"] for name, found in content["moved"].items()}
    assert list(shares.values()) == pytest.approx([shares["mixed"]] * 3)  # the spread of the base model's features
    assert all(len(content[kind][name]) == 64 for kind in ("pca", "tsne") for name in SYSTEMS)


def test_moved_is_in_units_of_the_spread_and_by_axis() -> None:
    before = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])  # each 3 from the centre
    after = before + np.array([[0.0, 6.0], [0.0, 0.0], [4.5, 0.0], [4.5, 0.0]])
    assert moved(before, after, ["a", "a", "b", "b"]) == pytest.approx({"a": 1.0, "b": 1.5})


def test_distances_are_means_over_prompts_by_axis_and_of_all() -> None:
    before = np.array([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    after = before + np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    assert distance(before, after, ["a", "b", "b"]) == pytest.approx({"a": 5.0, "b": 0.5, "all": 2.0})


def test_one_axis_has_no_clusters_to_draw() -> None:
    """A logarithmic scale of nothing can't be drawn."""
    nothing = {"1": {name: dict[str, float]() for name in SYSTEMS}}
    figure = plotting.figure(8, 3)
    _bars(figure.subplots(1, len(LABELS)), {"drawn_layer": 1, "indices": {"axis": nothing, "harm": nothing}})
    figure.savefig(io.BytesIO())
