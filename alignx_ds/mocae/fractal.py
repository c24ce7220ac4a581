"""The fractal (geometric) calibrator: how much of an expert's own mass surrounds a query, scale by scale.

The paper (arXiv 2602.07381) names the calibrator; the formula is ours (docs/method.md). It uses Gaussian kernels in the
few leading latent dimensions, because counts of neighbours carry no information in many dimensions (measured: accuracy
0.49 with hard counts in 64 dimensions). Shapes: ... any leading dimensions, f leading latent dimensions, E experts,
M anchors per expert, S scales. Everything is fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, unflatten


class Masses(NamedTuple):
    """Each expert's log mass and its score, with what they need of the anchors and scales alone computed once."""

    flat: Tensor  # [E·M, f], the anchors
    lengths: Tensor  # [E·M], their squared norms
    squares: Tensor  # [S], of the scales
    slope: Tensor  # [S], the logarithms of the scales less their mean
    spread: Tensor  # [], the slope's squared norm
    size: tuple[int, int]  # (E, M)

    @classmethod
    def of(cls, anchors: Tensor, scales: Tensor) -> Masses:
        """anchors [E, M, f], scales [S]."""
        flat, slope = anchors.flatten(0, 1), scales.log() - scales.log().mean()
        size = (anchors.shape[0], anchors.shape[1])
        return cls(flat, flat.square().sum(-1), scales.square(), slope, slope.square().sum(), size)

    def log_mass(self, z: Tensor) -> Tensor:
        """As the function `log_mass`."""
        squared = z.square().sum(-1, keepdim=True) + self.lengths - 2 * (z @ self.flat.T)
        squared = unflatten(squared.clamp_min(0), -1, self.size)
        exponents = -0.5 * squared.unsqueeze(-1) / self.squares
        return exponents.logsumexp(-2) - math.log(self.size[1])

    def score(self, z: Tensor, dimensions: Tensor) -> Tensor:
        """As the function `fractal_score`."""
        mass = self.log_mass(z)
        return mass.mean(-1) - (_slope(mass, self.slope, self.spread) - dimensions).abs()


def log_mass(z: Tensor, anchors: Tensor, scales: Tensor) -> Tensor:
    """log (1/M) Σₘ exp(−‖z − aₑₘ‖² / 2s²): the mean Gaussian kernel between a query and each expert's anchors.

    z [..., f], anchors [E, M, f], scales [S], in units of the latent space -> [..., E, S], at most 0.
    """
    return Masses.of(anchors, scales).log_mass(z)


def local_dimension(mass: Tensor, scales: Tensor) -> Tensor:
    """The least-squares slope of log mass over log scale, a correlation dimension. [..., S], [S] -> [...]."""
    x = scales.log() - scales.log().mean()
    return _slope(mass, x, x.square().sum())


def _slope(mass: Tensor, x: Tensor, spread: Tensor) -> Tensor:
    """Of the least-squares line of mass [..., S] over x [S], whose mean is 0 and whose squared norm is `spread`."""
    return (mass * x).sum(-1) / spread


def fractal_score(z: Tensor, anchors: Tensor, scales: Tensor, dimensions: Tensor) -> Tensor:
    """meanₛ log mass − |local dimension − Dₑ|: high where expert e has mass of its own dimension Dₑ around z.

    z [..., f], anchors [E, M, f], scales [S], dimensions [E] -> [..., E].
    """
    return Masses.of(anchors, scales).score(z, dimensions)


class MeanShift(NamedTuple):
    """The mean-shift step z -> weights(z) @ back − z, along which each expert's log mass grows.

    Two linear maps around a softmax, with K = E·S·M kernels, one per expert, scale and anchor; `back` averages over the
    scales.
    """

    into: Tensor  # [..., f, K]
    offset: Tensor  # [..., 1, K]
    back: Tensor  # [..., K, f]
    kernels: tuple[int, int]  # (E·S, M)

    @classmethod
    def of(cls, anchors: Tensor, scales: Tensor) -> MeanShift:
        """anchors [..., E, M, f], scales [S]. The exponents leave out ‖z‖², which cancels in the softmax."""
        narrow = scales.square()[:, None, None]
        spread = anchors.unsqueeze(-3)  # [..., E, 1, M, f]
        return cls(
            into=(spread / narrow).flatten(-4, -2).mT,
            offset=(-0.5 * spread.square().sum(-1) / narrow.squeeze(-1)).flatten(-3).unsqueeze(-2),
            back=(spread / len(scales)).expand(*spread.shape[:-3], len(scales), -1, -1).flatten(-4, -2),
            kernels=(anchors.shape[-3] * len(scales), anchors.shape[-2]),
        )

    def weights(self, z: Tensor) -> Tensor:
        """z [..., f] -> softmaxₘ(−‖z − aₑₘ‖² / 2s²) [..., E·S, M]."""
        exponents = z @ self.into + (self.offset if self.into.dim() > 2 else self.offset.squeeze(0))
        return unflatten(exponents, -1, self.kernels).softmax(-1)
