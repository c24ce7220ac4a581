"""The constants of the fractal and the natural calibrator at one location; `alignx_ds.routing.fit_geometry` fits them.

Shapes: d size of the features (4 hidden sizes at a gate, 1 at an output), k latent size, f leading latent dimensions of
the fractal score, E experts, M anchors per expert, S scales. All fp32. Our formulation (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The latent geometry of one location: a gate's input, or a layer's output."""

    centre: Tensor  # [d] mean of all experts' features
    projection: Tensor  # [k, d] whitened PCA: z = projection @ (h - centre)
    means: Tensor  # [E, k] mean of each expert's own features
    whiteners: Tensor  # [E, k, k] inverse Cholesky factor of each shrunk covariance
    log_volumes: Tensor  # [E] sum of the log diagonal of the Cholesky factor
    anchors: Tensor  # [E, M, f] k-means centres in the f leading latent dimensions
    scales: Tensor  # [S] kernel widths, each twice the one before
    present: Tensor  # [E] 1 where the expert has queries of its own, 0 where nothing is routed to it
    dimensions: Tensor  # [E] correlation dimension of each expert's own queries
    score_shift: Tensor  # [2] mean of the (fractal, natural) scores on the calibration split
    score_scale: Tensor  # [2] their standard deviation

    @property
    def num_experts(self) -> int:
        return self.means.shape[0]

    @property
    def latent_size(self) -> int:
        return self.means.shape[1]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All of them by prefix + name, contiguous."""
        return {prefix + f.name: getattr(self, f.name).contiguous() for f in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str = "") -> Geometry:
        """The inverse of `tensors`; other entries are ignored."""
        return cls(**{f.name: tensors[prefix + f.name] for f in fields(cls)})

    @classmethod
    def blank(cls, d: int, k: int, f: int, experts: int, anchors: int, scales: int) -> Geometry:
        """A valid geometry of these sizes without information, whose buffers a checkpoint then fills."""
        return cls(
            centre=torch.zeros(d),
            projection=torch.eye(k, d),
            means=torch.zeros(experts, k),
            whiteners=torch.eye(k).repeat(experts, 1, 1),
            log_volumes=torch.zeros(experts),
            anchors=torch.zeros(experts, anchors, f),
            scales=torch.ones(scales).cumsum(0),
            present=torch.ones(experts),
            dimensions=torch.ones(experts),
            score_shift=torch.zeros(2),
            score_scale=torch.ones(2),
        )
