"""Output calibration and reinjection: ỹ = y + R·(C(Q y) − Q y), with C(z) = z + λ₁·Fractal(z) + λ₂·Natural(z).

Fractal(z) and Natural(z) are the directions in which the two calibrators' scores grow under the gates: a mean-shift
step towards the experts' anchors, and a natural-gradient step towards their means. Our formulation (DESIGN §3).
Shapes: B rows, T tokens, d hidden, k latent, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from alignx_ds.mocae.fractal import fractal_pull
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.natural import natural_pull


class OutputCalibration(nn.Module):
    """Starts as the identity: R is zero until stage 2 trains it (DESIGN invariant 2)."""

    centre: Tensor
    projection: Tensor
    means: Tensor
    anchors: Tensor
    scales: Tensor

    def __init__(self, geometry: Geometry, fractal_weight: float, natural_weight: float) -> None:
        super().__init__()
        for name in ("centre", "projection", "means", "anchors", "scales"):
            self.register_buffer(name, getattr(geometry, name).float().clone())
        self.strengths = nn.Parameter(torch.tensor([fractal_weight, natural_weight], dtype=torch.float32))
        self.reinjection = nn.Parameter(
            torch.zeros(geometry.centre.shape[0], geometry.latent_size, dtype=torch.float32)
        )
        self.last_drift: Tensor | None = None  # [B] ‖ỹ − y‖²/‖y‖² of the last training call, pads left out

    def forward(self, y: Tensor, gates: Tensor, token_mask: Tensor | None = None, count: int | None = None) -> Tensor:
        """y [B, T, d], gates [B, T or 1, E], token_mask [B, T] (0 on padding) -> [B, T, d].

        `count` of one says that the gates are one-hot, so that the other experts' anchors need not be looked at.
        """
        projection, gates = self.projection.float(), gates.float()
        z = linear(y.float(), projection, -(projection * self.centre.float()).sum(-1))
        natural = natural_pull(z, gates, self.means.float())
        anchors = self.anchors.float()
        if count == 1 and gates.shape[1] == 1:
            anchors = anchors.index_select(0, gates.squeeze(1).argmax(-1)).unsqueeze(1)  # [B, 1, M, f]
            gates = torch.ones_like(gates[..., :1])
        leading = anchors.shape[-1]
        fractal = fractal_pull(z[..., :leading], gates, anchors, self.scales.float())
        strengths = self.strengths.float()
        step = strengths[0] * pad(fractal, (0, z.shape[-1] - leading)) + strengths[1] * natural
        change = step @ self.reinjection.float().T
        if self.training:
            weight = torch.ones(y.shape[:-1], device=y.device) if token_mask is None else token_mask.float()
            energy = (y.detach().float().square().sum(-1) * weight).sum(-1)
            self.last_drift = (change.square().sum(-1) * weight).sum(-1) / energy.clamp_min(1e-12)
        return y + change.to(y.dtype)
