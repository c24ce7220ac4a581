"""The natural (semantic) calibrator: how likely a query is under each expert's own distribution.

Shapes: ... any leading dimensions, k latent size, E experts. Our formulation (DESIGN §3): the paper names
the calibrator without a formula.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def natural_score(z: Tensor, means: Tensor, whiteners: Tensor, log_volumes: Tensor) -> Tensor:
    """Gaussian log-density per latent dimension: distance measured by the expert's own Fisher metric.

    z [..., k] fp32, means [E, k], whiteners [E, k, k], log_volumes [E] -> [..., E].
    """
    k = z.shape[-1]
    # (z - m) @ Wᵀ for all experts is one GEMM on z, less a constant per expert.
    stacked = whiteners.reshape(-1, k)
    offsets = torch.einsum("ekj,ej->ek", whiteners, means)
    whitened = torch.unflatten(z @ stacked.T, -1, (means.shape[0], k)) - offsets
    return -(0.5 * whitened.square().sum(-1) + log_volumes) / k - 0.5 * math.log(2 * math.pi)
