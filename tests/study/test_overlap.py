"""Overlap: against cases worked by hand, and on a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import generator

from alignx_ds.experts.task_vectors import layer_file
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.study import prompt_overlap
from alignx_ds.study.overlap import LEADING, conflicts, measure
from alignx_ds.study.studied_run import StudiedRun

Study = Callable[[str], dict[str, Any]]


def outer(m: int, n: int, *entries: tuple[int, int, float]) -> torch.Tensor:
    made = torch.zeros(m, n)
    for i, j, value in entries:
        made[i, j] = value
    return made


def test_cosine_and_overlaps_by_hand() -> None:
    """In [4, 3], of rank 2: outputs e0, e1 of the first, e0, e2 of the second; inputs e0, e1 and e0, e1 again."""
    first, second = outer(4, 3, (0, 0, 3.0), (1, 1, 4.0)), outer(4, 3, (0, 0, -6.0), (2, 1, 8.0))
    found = conflicts([[first, second]], rank=2)
    np.testing.assert_allclose(found["cosine"], [[1, -18 / 50], [-18 / 50, 1]], atol=1e-12)
    np.testing.assert_allclose(found["output"], [[1, 0.5], [0.5, 1]], atol=1e-12)
    np.testing.assert_allclose(found["input"], [[1, 1], [1, 1]], atol=1e-12)
    assert found["random"] == {"output": 2 / 4, "input": 2 / 3}
    assert found["by_weight"] == [{what: found[what] for what in ("cosine", "random", "output", "input")}]


def test_the_cosine_is_of_all_weights_together_and_an_overlap_their_mean() -> None:
    same, apart = outer(2, 2, (0, 0, 1.0)), outer(2, 2, (1, 1, 1.0))
    found = conflicts([[3 * same, 3 * same], [same, -apart]], rank=1)
    assert found["cosine"][0][1] == pytest.approx(9 / 10)
    assert found["output"][0][1] == pytest.approx((1 + 0) / 2)
    alone = [(own["cosine"][0][1], own["output"][0][1]) for own in found["by_weight"]]
    assert alone == [(pytest.approx(1), pytest.approx(1)), (pytest.approx(0), pytest.approx(0))]


def test_random_subspaces_overlap_as_is_said() -> None:
    source = generator(0)
    found = conflicts([[torch.randn(48, 32, generator=source) for _ in range(6)] for _ in range(5)], rank=4)
    for side in ("output", "input"):
        others = np.array(found[side])[~np.eye(6, dtype=bool)]
        assert others.mean() == pytest.approx(found["random"][side], rel=0.15)


def test_the_overlap_of_a_run_is_that_of_its_specialists(study: Study, studied_run: StudiedRun) -> None:
    content = study("overlap")
    assert content["axes"] == studied_run.axes and content["rank"] == LEADING
    for what in ("cosine", "output", "input"):
        values = np.array(content[what])
        np.testing.assert_allclose(values, values.T, atol=1e-9)
        np.testing.assert_allclose(np.diag(values), 1.0, atol=1e-9)
    off = ~np.eye(3, dtype=bool)
    assert (np.array(content["output"])[off] > content["random"]["output"]).all()
    weights = [(own["layer"], own["projection"]) for own in content["by_weight"]]
    assert weights == [(layer, p) for layer in studied_run.base.layers for p in PROJECTIONS]
    assert np.mean([own["output"] for own in content["by_weight"]], axis=0) == pytest.approx(
        np.array(content["output"])
    )


def test_what_one_axis_alone_changes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter may change the attention, where the other axes change FFNs."""
    source = generator(0)
    for axis, names in (("adapter", (*PROJECTIONS, "q")), ("ffn", PROJECTIONS)):
        (tmp_path / axis).mkdir()
        tensors = {f"task_vector.{p}": torch.randn(4, 4, generator=source) for p in names}
        save_file(tensors, layer_file(tmp_path / axis, 1))
    for axes in (["adapter", "ffn"], ["ffn", "adapter"]):
        studied: Any = SimpleNamespace(axes=axes, fine_tune=tmp_path.joinpath, base=SimpleNamespace(layers=[1]))
        monkeypatch.setattr(prompt_overlap, "measure", lambda studied: {})
        found = measure(studied)
        assert found["weights"] == len(PROJECTIONS)
        assert [own["projection"] for own in found["by_weight"]] == list(PROJECTIONS)
