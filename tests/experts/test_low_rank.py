"""The low-rank approximations of a task vector are optimal on the axis's own features (invariant 1, second half)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import generator
from torch import Tensor

from alignx_ds.experts.low_rank import LowRank, TaskFeatures

Array = NDArray[np.float64]


def problem(m: int, n: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """(features [N, n] of unequal directions, change [m, n])."""
    source = generator(seed)
    features = torch.randn(rows, n, generator=source) * torch.logspace(0.5, -1.5, n)
    return features @ torch.randn(n, n, generator=source), torch.randn(m, n, generator=source)


def factored(features: Tensor, change: Tensor, rank: int) -> LowRank:
    collected = TaskFeatures(change)
    collected.add(features)
    return collected.factor(rank)


def weighted_error(features: Tensor, change: Tensor, approximation: Array) -> float:
    """‖F(ΔW − approximation)ᵀ‖ / ‖F ΔWᵀ‖."""
    f, c = features.double().numpy(), change.double().numpy()
    return float(np.linalg.norm(f @ (c - approximation).T) / np.linalg.norm(f @ c.T))


def product(low_rank: LowRank) -> Array:
    return np.asarray((low_rank.up.double() @ low_rank.down.double()).numpy())


def by_alternating_least_squares(features: Tensor, change: Tensor, rank: int, seed: int) -> float:
    """The least weighted error at this rank, found by a numerical search without singular vectors."""
    f, c = features.double().numpy(), change.double().numpy()
    target = f @ c.T
    up = np.random.default_rng(seed).standard_normal((c.shape[0], rank))
    for _ in range(300):
        down = np.linalg.lstsq(f, target @ np.linalg.pinv(up.T), rcond=None)[0].T
        up = np.linalg.lstsq(f @ down.T, target, rcond=None)[0].T
    return weighted_error(features, change, up @ down)


def truncated_svd(change: Tensor, rank: int) -> Array:
    u, s, vt = np.linalg.svd(change.double().numpy(), full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


@settings(max_examples=25, deadline=None)
@given(m=st.integers(2, 9), n=st.integers(2, 9), rows=st.integers(2, 30), seed=st.integers(0, 1000))
def test_the_error_falls_with_the_rank_and_is_never_above_plain_svd_s(m: int, n: int, rows: int, seed: int) -> None:
    features, change = problem(m, n, rows, seed)
    singular = np.linalg.svd(features.double().numpy() @ change.double().numpy().T, compute_uv=False)
    before = 1.0
    for rank in range(1, min(m, n) + 1):
        made = factored(features, change, rank)
        assert made.up.shape == (m, rank) and made.down.shape == (rank, n)
        error = weighted_error(features, change, product(made))
        plain = weighted_error(features, change, truncated_svd(change, rank))
        optimum = float(np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum()))  # Eckart-Young, on the whole M
        assert error == pytest.approx(optimum, abs=1e-5)
        assert error <= plain + 1e-5 and error <= before + 1e-6
        assert made.error == pytest.approx(error, abs=1e-5)
        assert made.plain_svd_error == pytest.approx(plain, abs=1e-5)
        before = error
    assert before < 1e-5


@pytest.mark.parametrize(("m", "n", "rank"), [(6, 8, 1), (6, 8, 3), (8, 6, 2), (7, 7, 4)])
def test_no_search_finds_a_better_approximation(m: int, n: int, rank: int) -> None:
    features, change = problem(m, n, 40, seed=m * 10 + rank)
    found = min(by_alternating_least_squares(features, change, rank, seed) for seed in range(3))
    made = factored(features, change, rank)
    assert weighted_error(features, change, product(made)) == pytest.approx(found, rel=1e-3)
    assert made.plain_svd_error > 1.05 * found  # the features do matter here


@pytest.mark.parametrize(("m", "n"), [(5, 9), (9, 5)])
def test_rank_zero_keeps_all_of_it_whatever_the_features(m: int, n: int) -> None:
    features, change = problem(m, n, 2, seed=1)  # two rows say nothing of most directions
    made = factored(features, change, 0)
    assert made.down.shape[0] == min(m, n)
    np.testing.assert_allclose(product(made), change.double().numpy(), atol=1e-5)
    np.testing.assert_allclose(product(factored(features, change, 100)), change.double().numpy(), atol=1e-5)


def test_features_may_be_added_in_any_parts() -> None:
    features, change = problem(6, 9, 50, seed=4)
    streamed = TaskFeatures(change)
    for part in features.split(7):
        streamed.add(part)
    assert streamed.factor(2).error == pytest.approx(factored(features, change, 2).error, rel=1e-6)
    np.testing.assert_allclose(product(streamed.factor(2)), product(factored(features, change, 2)), atol=1e-5)


def test_the_spectrum_is_that_of_the_task_feature_matrix() -> None:
    features, change = problem(6, 9, 50, seed=4)
    collected = TaskFeatures(change)
    collected.add(features)
    energies, directions = collected.spectrum()
    singular = np.linalg.svd((features.double() @ change.double().T).numpy(), compute_uv=False)
    np.testing.assert_allclose(energies.sqrt().numpy(), singular, rtol=1e-6)
    np.testing.assert_allclose((directions.T @ directions).numpy(), np.eye(6), atol=1e-10)


def test_no_change_and_no_features_are_no_error() -> None:
    features, change = problem(6, 9, 50, seed=4)
    unchanged = factored(features, torch.zeros_like(change), 2)
    assert unchanged.error == 0.0 and not np.isnan(product(unchanged)).any()
    unseen = TaskFeatures(change).factor(2)
    assert unseen.error == 0.0 and torch.isfinite(unseen.up).all()
