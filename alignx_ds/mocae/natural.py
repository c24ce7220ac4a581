"""The natural (semantic) calibrator: how likely a query is under each expert's own distribution.

The paper (arXiv 2602.07381) names the calibrator; the formula is ours (docs/method.md). Shapes: ... any leading
dimensions, k latent size, E experts. Everything is fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gaussians(NamedTuple):
    """The experts' distributions, with what the densities need of them alone computed once."""

    stacked: Tensor  # [E·k, k], the whiteners
    offsets: Tensor  # [E, k], the whitened means

    @classmethod
    def of(cls, means: Tensor, whiteners: Tensor) -> Gaussians:
        """means m [E, k], whiteners W [E, k, k] with WᵀW = Σ⁻¹."""
        return cls(whiteners.reshape(-1, means.shape[-1]), torch.einsum("ekj,ej->ek", whiteners, means))

    def squared_distances(self, z: Tensor) -> Tensor:
        """‖Wₑ(z − mₑ)‖², [..., k] -> [..., E]: one GEMM on z for all experts, less a constant for each."""
        whitened = torch.unflatten(z @ self.stacked.T, -1, self.offsets.shape) - self.offsets
        return whitened.square().sum(-1)

    def score(self, z: Tensor, log_volumes: Tensor) -> Tensor:
        """As the function `natural_score`."""
        k = z.shape[-1]
        return (0.5 * self.squared_distances(z) + log_volumes) / -k - 0.5 * math.log(2 * math.pi)


def natural_score(z: Tensor, means: Tensor, whiteners: Tensor, log_volumes: Tensor) -> Tensor:
    """log N(z; mₑ, Σₑ) / k = −(½‖Wₑ(z − mₑ)‖² + log|Σₑ|/2) / k − ½ log 2π, the Gaussian log-density per dimension.

    z [..., k], means m [E, k], whiteners W [E, k, k] with WᵀW = Σ⁻¹, log_volumes ½ log|Σ| [E] -> [..., E] in nats.
    """
    return Gaussians.of(means, whiteners).score(z, log_volumes)


def distances(z: Tensor, means: Tensor, whiteners: Tensor) -> Tensor:
    """‖Wₑ(z − mₑ)‖ / √k, the Mahalanobis distance per dimension: about 1 for a query of expert e's own distribution.

    z [..., k], means m [E, k], whiteners W [E, k, k] -> [..., E].
    """
    return (Gaussians.of(means, whiteners).squared_distances(z) / z.shape[-1]).sqrt()
