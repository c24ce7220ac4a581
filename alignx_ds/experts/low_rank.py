"""From a task vector to an expert: the best low-rank approximation of ΔW on the axis's own features.

The task-feature matrix of arXiv 2602.07381 is M = F·ΔWᵀ in our reading (docs/method.md), with features F [N, n] and
change ΔW [m, n]. By Eckart–Young the minimiser of ‖F(ΔW − U D)ᵀ‖ over rank r is U = the top r right singular vectors
of M, and D = UᵀΔW. A thin QR, ΔW = Q·R, reduces the output side to p = min(m, n): only a p × p matrix is accumulated,
however many tokens there are, and at r = p the approximation is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """ΔW ≈ up @ down with `up` [m, r] and `down` [r, n], fp32.

    `error` is ‖F(ΔW − up·down)ᵀ‖ / ‖F·ΔWᵀ‖, in [0, 1]; `plain_svd_error` is that of ΔW's own SVD of the same rank.
    """

    up: Tensor
    down: Tensor
    error: float
    plain_svd_error: float


class TaskFeatures:
    """Accumulates QᵀMᵀM Q from streamed features in fp64, with Q [m, p] the basis of the change's column space."""

    def __init__(self, change: Tensor) -> None:
        """change ΔW [m, n], on the device that the features will be on."""
        self.basis, self.reduced = torch.linalg.qr(change.double())  # [m, p], [p, n]
        size = self.reduced.shape[0]
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=change.device)

    def add(self, features: Tensor) -> None:
        """features [N, n], further rows of F."""
        task_features = features.double() @ self.reduced.T
        self.gram += task_features.T @ task_features

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """(squared singular values [p], descending; right singular vectors in the basis Q, the columns of [p, p])."""
        energies, directions = torch.linalg.eigh(self.gram)
        return energies.flip(0).clamp_min(0), directions.flip(1)

    def factor(self, rank: int) -> LowRank:
        """The best approximation of at most this rank; 0 stands for full rank, p."""
        energies, directions = self.spectrum()
        r = min(rank, len(energies)) if rank else len(energies)
        chosen = directions[:, :r]
        total = energies.sum().clamp_min(torch.finfo(torch.float64).tiny)
        plain = torch.linalg.svd(self.reduced, full_matrices=False).U[:, :r]
        missed = self.gram - plain @ (plain.T @ self.gram)
        plain_energy = torch.trace(missed - (missed @ plain) @ plain.T).clamp_min(0)
        return LowRank(
            up=(self.basis @ chosen).float(),
            down=(chosen.T @ self.reduced).float(),
            error=float((energies[r:].sum() / total).sqrt()),
            plain_svd_error=float((plain_energy / total).sqrt()),
        )
