"""Output calibration and reinjection: ỹ = y + R·(C(Q y) − Q y), with C(z) = z + λ₁·Fractal(z) + λ₂·Natural(z).

Fractal(z) and Natural(z) are the directions in which the two calibrators' scores grow under the gates: a mean-shift
step towards the experts' anchors, and a natural-gradient step towards their means. Our formulation (DESIGN §3).
Shapes: B rows, T tokens, d hidden, k latent, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from alignx_ds.mocae import kernels
from alignx_ds.mocae.fractal import MeanShift
from alignx_ds.mocae.geometry import Geometry


class Pull(NamedTuple):
    """The step's maps under given gates; C kernels (fractal.MeanShift)."""

    bias: Tensor  # [k] of z
    shift: MeanShift
    gates: Tensor | None  # [B, T or 1, E·S, 1], absent where one expert alone has a gate
    back: Tensor  # [C, k] or [B, C, k], weighted by λ₁
    rest: Tensor  # [B, T or 1, k], weighted by λ₂
    damping: Tensor  # [k]


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
        self._tables: tuple[list[tuple[int, int]], kernels.Tables] | None = None  # and what they were made from
        self.last_drift: Tensor | None = None  # [B] ‖ỹ − y‖²/‖y‖² of the last training call, pads left out

    def pull(self, gates: Tensor, count: int | None = None) -> Pull:
        """Everything of the step that a row's gates fix: gates [B, T or 1, E] fp32. While decoding, made once a prompt.

        `count` of one says that the gates are one-hot, so that the other experts' anchors need not be looked at.
        """
        fractal, natural = self.strengths.float().unbind()
        anchors, scales, projection = self.anchors.float(), self.scales.float(), self.projection.float()
        one = count == 1 and gates.shape[1] == 1
        if one:
            anchors = anchors.index_select(0, gates.squeeze(1).argmax(-1)).unsqueeze(1)  # [B, 1, M, f]
        shift = MeanShift.of(anchors, scales)
        unused = projection.shape[0] - anchors.shape[-1]
        leading = pad(projection.new_ones(anchors.shape[-1]), (0, unused))
        return Pull(
            bias=-(projection * self.centre.float()).sum(-1),
            shift=shift,
            gates=None if one else gates.repeat_interleave(len(scales), dim=-1).unsqueeze(-1),
            back=pad(fractal * shift.back, (0, unused)),
            rest=natural * (gates @ self.means.float()),
            damping=-(natural + fractal * leading),
        )

    def tables(self) -> kernels.Tables:
        """Every expert's pull. They are made anew only when what they are made from has changed."""
        sources = (self.strengths, self.centre, self.projection, self.means, self.anchors, self.scales)
        made_from = [(t.data_ptr(), t._version) for t in sources]
        if self._tables is None or self._tables[0] != made_from:
            experts = len(self.means)
            p = self.pull(torch.eye(experts, device=self.means.device).unsqueeze(1), count=1)
            made = kernels.Tables(
                bias=p.bias,
                into=p.shift.into.contiguous(),
                offset=p.shift.offset.squeeze(1).contiguous(),
                back=p.back.contiguous(),
                rest=p.rest.squeeze(1).contiguous(),
                damping=p.damping,
                scales=len(self.scales),
            )
            self._tables = (made_from, made)
        return self._tables[1]

    def forward(
        self,
        y: Tensor,
        gates: Tensor,
        token_mask: Tensor | None = None,
        count: int | None = None,
        pulls: list[Pull] | None = None,
        experts: Tensor | None = None,
        tables: list[kernels.Tables] | None = None,
    ) -> Tensor:
        """y [B, T, d], gates [B, T or 1, E], token_mask [B, T] (0 on padding) -> [B, T, d].

        `count` is `pull`'s; `pulls` holds a prompt's own, made before, or is an empty list that is to hold it. Where
        kernels.serve says so, `experts` [B] and `tables` take their place.
        """
        if experts is not None and tables is not None:
            if not tables:
                tables.append(self.tables())
            return kernels.calibrate(y, self.projection.float(), self.reinjection.float(), tables[0], experts)
        p = pulls[0] if pulls else self.pull(gates.float(), count)
        if pulls is not None and not pulls:
            pulls.append(p)
        wide, reinjection = y.float(), self.reinjection.float()
        z = linear(wide, self.projection.float(), p.bias)
        weights = p.shift.weights(z[..., : p.shift.into.shape[-2]])
        weights = (weights if p.gates is None else weights * p.gates).flatten(-2)
        # λ₁·Fractal(z) + λ₂·Natural(z), with what either subtracts of z taken together
        step = torch.addcmul(p.rest, z, p.damping)
        step = step + weights @ p.back if p.back.dim() == 2 else torch.baddbmm(step, weights, p.back)
        if self.training:
            change = linear(step, reinjection)
            weight = torch.ones(y.shape[:-1], device=y.device) if token_mask is None else token_mask.float()
            energy = (y.detach().float().square().sum(-1) * weight).sum(-1)
            self.last_drift = (change.square().sum(-1) * weight).sum(-1) / energy.clamp_min(1e-12)
        calibrated = torch.addmm(wide.flatten(0, 1), step.flatten(0, 1), reinjection.T)
        return calibrated.view_as(y).to(y.dtype)
