"""The indices against values worked out by hand, and against what may not change them."""

from __future__ import annotations

import numpy as np
import pytest

from alignx_ds.study.cluster_indices import HIGHER_IS_BETTER, Labels, Points, aqi, cluster_indices, dunn, xie_beni

# Two pairs on a line: {0, 2} and {10, 14}, centroids 1 and 12.
LINE, PAIRS = np.array([[0.0], [2.0], [10.0], [14.0]]), np.array([0, 0, 1, 1])


def blobs(distance: float) -> tuple[Points, Labels]:
    rng = np.random.default_rng(0)
    centres = distance * np.eye(3)
    labels = np.repeat(np.arange(3), 20)
    return centres[labels] + rng.normal(size=(60, 3)), labels


def test_xie_beni_by_hand() -> None:
    squared = 1 + 1 + 4 + 4  # to the own centroid
    assert xie_beni(LINE, PAIRS) == pytest.approx(squared / 4 / (12 - 1) ** 2)


def test_xie_beni_looks_at_the_two_centroids_that_are_nearest() -> None:
    points, labels = np.concatenate([LINE, [[100.0], [102.0]]]), np.array([0, 0, 1, 1, 2, 2])
    assert xie_beni(points, labels) == pytest.approx((1 + 1 + 4 + 4 + 1 + 1) / 6 / (12 - 1) ** 2)


def test_dunn_by_hand() -> None:
    assert dunn(LINE, PAIRS) == pytest.approx((10 - 2) / (14 - 10))


def test_all_five_by_hand() -> None:
    found = cluster_indices(LINE, PAIRS)
    between, within = 2 * (6.5 - 1) ** 2 + 2 * (12 - 6.5) ** 2, 10.0
    outer = [(12 - 2) / 12, (10 - 2) / 10, (9 - 4) / 9, (13 - 4) / 13]  # (b − a)/max(a, b) of 0, 2, 10, 14
    assert found["calinski_harabasz"] == pytest.approx(between / 1 / (within / 2))
    assert found["davies_bouldin"] == pytest.approx((1 + 2) / 11)
    assert found["silhouette"] == pytest.approx(sum(outer) / 4)
    assert list(found) == list(HIGHER_IS_BETTER)


def test_aqi_by_hand() -> None:
    base, other = {"calinski_harabasz": 2.0, "xie_beni": 3.0}, {"calinski_harabasz": 6.0, "xie_beni": 1.0}
    assert aqi(base, base) == 0.5
    assert aqi(other, base, 0.25) == pytest.approx(0.25 * 6 / (6 + 2) + 0.75 * 3 / (1 + 3))
    together = {"calinski_harabasz": 0.0, "xie_beni": float("inf")}  # centroids in one place
    assert [aqi(together, base), aqi(base, together), aqi(together, together)] == [0.0, 1.0, 0.5]


@pytest.mark.parametrize("index", HIGHER_IS_BETTER)
def test_moving_turning_scaling_and_renaming_change_nothing(index: str) -> None:
    points, labels = blobs(4.0)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    before = cluster_indices(points, labels)[index]
    assert cluster_indices(7.0 * points @ turn + 3.0, 5 - 2 * labels)[index] == pytest.approx(before)
    order = np.random.default_rng(2).permutation(len(points))
    assert cluster_indices(points[order], labels[order])[index] == pytest.approx(before)


@pytest.mark.parametrize(("index", "higher"), HIGHER_IS_BETTER.items())
def test_clusters_farther_apart_are_better(index: str, higher: bool) -> None:
    near, far = cluster_indices(*blobs(3.0))[index], cluster_indices(*blobs(12.0))[index]
    assert (far > near) == higher


def test_one_cluster_has_no_indices() -> None:
    assert cluster_indices(LINE, np.zeros(4, dtype=np.int64)) == {}
    assert cluster_indices(LINE, np.arange(4)) == {}


def test_clusters_in_one_place_are_infinitely_bad_not_an_error() -> None:
    assert xie_beni(np.array([[0.0], [2.0], [0.0], [2.0]]), PAIRS) == float("inf")
