"""From a task vector to an expert: the best low-rank stand-in for ΔW on the axis's own features.

With M = F·ΔWᵀ the task-feature matrix (features F [N, n], change ΔW [m, n]), the minimiser of ‖F(ΔW − U D)ᵀ‖ over
rank r is U = the top r right singular vectors of M and D = UᵀΔW (DESIGN §2.5; Eckart–Young). A thin QR, ΔW = Q·R,
reduces the output side to p = min(m, n): what is accumulated is p × p however many tokens stream by, and at r = p the
stand-in is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """`up` [m, r] and `down` [r, n]; errors are relative to ‖F·ΔWᵀ‖, that of plain SVD beside ours."""

    up: Tensor
    down: Tensor
    error: float
    plain_svd_error: float


class TaskFeatures:
    """Accumulates MᵀM in the basis Q of the change's column space, from streamed features, in fp64."""

    def __init__(self, change: Tensor) -> None:
        """change [m, n]."""
        self.basis, self.reduced = torch.linalg.qr(change.double())  # [m, p], [p, n]
        size = self.reduced.shape[0]
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=change.device)

    def add(self, features: Tensor) -> None:
        """features [N, n]: rows of F."""
        task_features = features.double() @ self.reduced.T
        self.gram += task_features.T @ task_features

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """(energies [p] descending, directions [p, p] as columns) of the task-feature matrix."""
        energies, directions = torch.linalg.eigh(self.gram)
        return energies.flip(0).clamp_min(0), directions.flip(1)

    def factor(self, rank: int) -> LowRank:
        """The best stand-in of at most this rank; 0 keeps full rank."""
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
