"""Merges of task vectors, against examples worked by hand, a naive version, and what their papers promise."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import ALIGNX_LAYERS, TABLE, base_model, generator, random_changes

from alignx_ds.baselines.merged import add_merged, dare, merge_of, task_arithmetic, ties
from alignx_ds.config.schema import BaselinesConfig, ModelConfig
from alignx_ds.experts.task_vectors import layer_file
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.models.base import BaseModel

AXES = ["helpful", "harmless", "honest"]


def vectors(shape: tuple[int, int] = (7, 11), seed: int = 3, count: int = 3) -> list[torch.Tensor]:
    source = generator(seed)
    return [torch.randn(shape, generator=source) for _ in range(count)]


def naive_ties(given: list[torch.Tensor], scale: float, density: float) -> np.ndarray:
    """Entry by entry, as the paper puts it."""
    arrays = [v.numpy().astype(np.float64) for v in given]
    out = np.zeros(arrays[0].shape)
    limits = [np.sort(np.abs(a).ravel())[::-1][round(density * a.size) - 1] for a in arrays]
    for place in np.ndindex(*out.shape):
        kept = [a[place] if abs(a[place]) >= limit else 0.0 for a, limit in zip(arrays, limits, strict=True)]
        positive, negative = sum(k for k in kept if k > 0), -sum(k for k in kept if k < 0)
        agreeing = [k for k in kept if (k > 0 if positive > negative else k < 0)]
        out[place] = scale * np.mean(agreeing) if agreeing else 0.0
    return out


def test_task_arithmetic_is_the_scaled_sum() -> None:
    a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 5.0]])
    assert torch.equal(task_arithmetic([a, b], 0.5), torch.tensor([[2.0, 1.5]]))


def test_ties_by_hand() -> None:
    """Half of six entries are kept; the second column is elected positive, in the third no entry is left."""
    a = torch.tensor([[4.0, -3.0, 0.1, 2.0, 0.2, -0.3]])
    b = torch.tensor([[2.0, 5.0, 0.1, -0.5, 0.2, -3.0]])
    c = torch.tensor([[0.1, 6.0, 0.2, -3.0, -0.1, -1.0]])
    # trimmed: a = 4 −3 · 2 · · | b = 2 5 · · · −3 | c = · 6 · −3 · −1
    expected = torch.tensor([[3.0, 5.5, 0.0, -3.0, 0.0, -2.0]])
    assert torch.allclose(ties([a, b, c], 1.0, 0.5), expected)
    assert torch.allclose(ties([a, b, c], 0.5, 0.5), expected / 2)


@pytest.mark.parametrize(("density", "count"), [(0.1, 1), (0.2, 5), (0.5, 2), (1.0, 3)])
def test_ties_is_the_naive_version(density: float, count: int) -> None:
    given = vectors(count=count)
    np.testing.assert_allclose(ties(given, 0.7, density).numpy(), naive_ties(given, 0.7, density), atol=1e-6)


def test_ties_of_one_vector_with_every_entry_is_that_vector() -> None:
    [vector] = vectors(count=1)
    assert torch.allclose(ties([vector], 1.0, 1.0), vector)


def test_dare_drops_and_rescales() -> None:
    [vector] = vectors((200, 300), count=1)
    made = dare([vector], 1.0, 0.25, [1])
    kept = made != 0
    assert abs(float(kept.float().mean()) - 0.25) < 0.01
    assert torch.allclose(made[kept], vector[kept] * 4)


def test_dare_is_unbiased() -> None:
    given = vectors(count=2)
    draws = torch.stack([dare(given, 0.5, 0.2, [n, 10_000 + n]) for n in range(4000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert float(((draws.mean(0) - task_arithmetic(given, 0.5)) / error).abs().max()) < 5
    assert torch.allclose(dare(given, 0.5, 1.0, [1, 2]), task_arithmetic(given, 0.5)), "nothing is dropped"


def test_dare_depends_on_the_seed_the_axis_and_the_weight_alone() -> None:
    given = [torch.ones(20, 20)] * 3
    c = BaselinesConfig(dare_scale=1.0, dare_density=0.5)
    merge, other = merge_of("dare", c, AXES, 0)[0], merge_of("dare", c, AXES, 1)[0]
    assert torch.equal(merge(given, "a"), merge_of("dare", c, AXES, 0)[0](given, "a"))
    assert not torch.equal(merge(given, "a"), merge(given, "b"))
    assert not torch.equal(merge(given, "a"), other(given, "a"))
    assert len(merge(given, "a").unique()) == 4, "the axes draw apart: 0 to 3 of them keep an entry"


def test_every_setting_is_part_of_what_a_merge_depends_on() -> None:
    """Or a changed setting would find the answers that the old one gave."""
    keys = {"task_arithmetic": ["arithmetic_scale"], "ties": ["ties_scale", "ties_density"]}
    keys["dare"] = ["dare_scale", "dare_density"]
    for name, settings in keys.items():
        before = merge_of(name, BaselinesConfig(), AXES, 0)[1]
        for key in settings:
            assert merge_of(name, BaselinesConfig(**{key: 0.33}), AXES, 0)[1] != before
    assert merge_of("dare", BaselinesConfig(), AXES, 1)[1] != merge_of("dare", BaselinesConfig(), AXES, 0)[1]


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare"])
def test_the_merge_is_added_to_the_alignx_layers(name: str, tmp_path: Path) -> None:
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    changes = random_changes(base)
    for number, axis in enumerate(AXES):
        (tmp_path / axis).mkdir()
        for layer in ALIGNX_LAYERS:
            tensors = {f"task_vector.{p}": changes[layer][number][p] for p in PROJECTIONS}
            save_file(tensors, layer_file(tmp_path / axis, layer))
    merge, _ = merge_of(name, BaselinesConfig(), AXES, 4)
    model = copy.deepcopy(base)
    described = BaseModel(ModelConfig(path=str(tmp_path / "base"), layers=ALIGNX_LAYERS))
    add_merged(model, described, [tmp_path / axis for axis in AXES], merge)
    before, changed = dict(base.named_parameters()), set()
    for layer in ALIGNX_LAYERS:
        for p in PROJECTIONS:
            weight = TABLE.weight_name(layer, p)
            expected = before[weight] + merge([changes[layer][n][p] for n in range(3)], weight)
            assert torch.equal(model.get_parameter(weight), expected)
            assert not torch.equal(expected, before[weight])
            changed.add(weight)
    for weight, parameter in model.named_parameters():
        assert weight in changed or torch.equal(parameter, before[weight])
