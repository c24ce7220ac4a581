"""Cluster validity indices of labelled points: those that AQI combines (arXiv 2506.13901), and an AQI of two of them.

None of them changes when all points are shifted, rotated or scaled together, so two systems can be compared although
their features have different norms.

Shapes: N points, D dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    calinski_harabasz_score,
    davies_bouldin_score,
    pairwise_distances,
    silhouette_score,
)

Points = NDArray[np.float64]  # [N, D]
Labels = NDArray[np.int64]  # [N]
HIGHER_IS_BETTER = {
    "silhouette": True,
    "calinski_harabasz": True,
    "dunn": True,
    "davies_bouldin": False,
    "xie_beni": False,
}


def xie_beni(points: Points, labels: Labels) -> float:
    """Mean squared distance of a point to its cluster's centroid, over the least squared distance of two centroids.

    Xie and Beni, A Validity Measure for Fuzzy Clustering, IEEE TPAMI 13(8), 1991, with memberships of 0 and 1.
    """
    names = np.unique(labels)
    centroids = np.stack([points[labels == name].mean(0) for name in names])
    own = centroids[np.searchsorted(names, labels)]
    apart = pairwise_distances(centroids) ** 2
    least = apart[~np.eye(len(names), dtype=bool)].min()
    return _over(float(((points - own) ** 2).sum(1).mean()), float(least))


def dunn(points: Points, labels: Labels) -> float:
    """Least distance between points of different clusters, over the largest distance between points of one cluster.

    Dunn, Well-Separated Clusters and Optimal Fuzzy Partitions, Journal of Cybernetics 4, 1974.
    """
    distances = pairwise_distances(points)
    same = labels[:, None] == labels[None, :]
    return _over(float(distances[~same].min()), float(distances[same].max()))


def cluster_indices(points: Points, labels: Labels) -> dict[str, float]:
    """All five, with Euclidean distance; empty for fewer than two clusters, or for no more points than clusters."""
    if not 1 < len(np.unique(labels)) < len(points):
        return {}
    return {
        "silhouette": float(silhouette_score(points, labels)),  # Rousseeuw 1987
        "calinski_harabasz": float(calinski_harabasz_score(points, labels)),  # Caliński and Harabasz 1974
        "dunn": dunn(points, labels),
        "davies_bouldin": float(davies_bouldin_score(points, labels)),  # Davies and Bouldin 1979
        "xie_beni": xie_beni(points, labels),
    }


def aqi(found: dict[str, float], base: dict[str, float], share: float = 0.5) -> float:
    """γ·CH/(CH + CH₀) + (1 − γ)·XB₀/(XB + XB₀), in (0, 1), higher is better: with γ = `share`, and ½ for the base.

    AQI is such a weighted sum of the normalised Calinski–Harabasz and Xie–Beni indices of safe against unsafe
    activations. Its published variants normalise differently, also by the models that are compared, so that a model's
    value depends on the others. Here the constants are the base model's own indices, CH₀ and XB₀: ours.
    """
    dense = _part(found["calinski_harabasz"], base["calinski_harabasz"])
    return share * dense + (1 - share) * _part(base["xie_beni"], found["xie_beni"])


def _part(a: float, b: float) -> float:
    """a/(a + b), also where one of them is infinite; ½ where both are, or both are zero."""
    return 0.5 if a == b else 1 / (1 + _over(b, a)) if a < float("inf") else 1.0


def _over(a: float, b: float) -> float:
    return a / b if b else float("inf")
