"""The natural (semantic) calibrator: how likely a query is under each expert's own distribution.

The paper (arXiv 2602.07381) names the calibrator; the formula is ours (docs/method.md). Shapes: ... any leading
dimensions, k latent size, E experts. Everything is fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def natural_score(z: Tensor, means: Tensor, whiteners: Tensor, log_volumes: Tensor) -> Tensor:
    """log N(z; mₑ, Σₑ) / k = −(½‖Wₑ(z − mₑ)‖² + log|Σₑ|/2) / k − ½ log 2π, the Gaussian log-density per dimension.

    z [..., k], means m [E, k], whiteners W [E, k, k] with WᵀW = Σ⁻¹, log_volumes ½ log|Σ| [E] -> [..., E] in nats.
    """
    k = z.shape[-1]
    return -(0.5 * _squared_distances(z, means, whiteners) + log_volumes) / k - 0.5 * math.log(2 * math.pi)


def distances(z: Tensor, means: Tensor, whiteners: Tensor) -> Tensor:
    """‖Wₑ(z − mₑ)‖ / √k, the Mahalanobis distance per dimension: about 1 for a query of expert e's own distribution.

    z [..., k], means m [E, k], whiteners W [E, k, k] -> [..., E].
    """
    return (_squared_distances(z, means, whiteners) / z.shape[-1]).sqrt()


def _squared_distances(z: Tensor, means: Tensor, whiteners: Tensor) -> Tensor:
    # (z - m) @ Wᵀ for all experts is one GEMM on z, less a constant per expert.
    stacked = whiteners.reshape(-1, z.shape[-1])
    offsets = torch.einsum("ekj,ej->ek", whiteners, means)
    whitened = torch.unflatten(z @ stacked.T, -1, means.shape) - offsets
    return whitened.square().sum(-1)
