"""Output calibration and reinjection: ỹ = y + R·(C(z) − z) with z = Q(y − μ), C(z) = z + λ₁·Fractal(z) + λ₂·Natural(z).

Fractal(z) = Σₑ gₑ meanₛ Σₘ wₑₛₘ(z) aₑₘ − z is the mean-shift step along which the fractal score grows under the gates
g: wₑₛ(z) is the softmax over expert e's anchors a at scale s, in the f leading latent dimensions. Natural(z) =
Σₑ gₑ mₑ − z is the natural-gradient step of the natural score, towards the experts' means m. That an output is
calibrated and reinjected is the paper's (arXiv 2602.07381); the formulas are ours (docs/method.md).
Shapes: B rows, T tokens, d hidden size, k latent size, f leading latent dimensions, E experts, S scales, M anchors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from alignx_ds.mocae import kernels
from alignx_ds.mocae.fractal import MeanShift
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.recomputation import is_recomputing


class GatedStep(NamedTuple):
    """The parts of C(z) − z that do not depend on z, for given gates; K kernels (fractal.MeanShift)."""

    bias: Tensor  # [k], −Qμ
    shift: MeanShift
    gates: Tensor | None  # [B, T or 1, E·S, 1], None where each row has one expert only
    back: Tensor  # [K, k] or [B, K, k], times λ₁
    rest: Tensor  # [B, T or 1, k], λ₂ Σₑ gₑ mₑ
    damping: Tensor  # [k], the factor of z: −λ₂, and −λ₁ more in the f leading dimensions


class OutputCalibration(nn.Module):
    """ỹ of this file's equation. R is zero until stage 2 trains it, so that it starts as the identity.

    λ₁, λ₂ and R are trained and fp32; the geometry is a set of fp32 buffers.
    """

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
        self._tables: tuple[list[tuple[int, int]], kernels.Tables] | None = None  # with the versions of their sources
        self.last_drift: Tensor | None = None  # [B] fp32, ‖ỹ − y‖²/‖y‖² of the last call in training, without padding

    def gated_step(self, gates: Tensor, count: int | None = None) -> GatedStep:
        """gates [B, T or 1, E] fp32 -> the parts of the step that they determine. Once per prompt while decoding.

        `count` = 1 promises one-hot gates: the other experts' anchors are then left out.
        """
        fractal, natural = self.strengths.float().unbind()
        anchors, scales, projection = self.anchors.float(), self.scales.float(), self.projection.float()
        one = count == 1 and gates.shape[1] == 1
        if one:
            anchors = anchors.index_select(0, gates.squeeze(1).argmax(-1)).unsqueeze(1)  # [B, 1, M, f]
        shift = MeanShift.of(anchors, scales)
        unused = projection.shape[0] - anchors.shape[-1]
        leading = pad(projection.new_ones(anchors.shape[-1]), (0, unused))
        return GatedStep(
            bias=-(projection * self.centre.float()).sum(-1),
            shift=shift,
            gates=None if one else gates.repeat_interleave(len(scales), dim=-1).unsqueeze(-1),
            back=pad(fractal * shift.back, (0, unused)),
            rest=natural * (gates @ self.means.float()),
            damping=-(natural + fractal * leading),
        )

    def tables(self) -> kernels.Tables:
        """The step's parts under every expert, computed again only after a change of the tensors that they need."""
        sources = (self._parameters["strengths"], *self._buffers.values())  # attributes of modules take the host longer
        versions = [(t.data_ptr(), t._version) for t in sources if t is not None]
        if self._tables is None or self._tables[0] != versions:
            experts = len(self.means)
            p = self.gated_step(torch.eye(experts, device=self.means.device).unsqueeze(1), count=1)
            made = kernels.Tables(
                bias=p.bias,
                into=p.shift.into.contiguous(),
                offset=p.shift.offset.squeeze(1).contiguous(),
                back=p.back.contiguous(),
                rest=p.rest.squeeze(1).contiguous(),
                damping=p.damping,
                scales=len(self.scales),
            )
            self._tables = (versions, made)
        return self._tables[1]

    def forward(
        self,
        y: Tensor | kernels.Unfinished,
        gates: Tensor | None = None,
        token_mask: Tensor | None = None,
        count: int | None = None,
        steps: list[GatedStep] | None = None,
        tables: list[kernels.Tables] | None = None,
        of_rows: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """y [B, T, d], gates [B, T or 1, E], token_mask [B, T] (0 on padding) -> ỹ [B, T, d] in the dtype of y.

        `count` is that of `gated_step`. `steps` holds what `gated_step` returned for these gates, or is an empty list,
        which is filled with it; where it holds it, no gates are needed. An unfinished y needs none either: it is
        finished by the Triton kernels, which run on `tables`. This holds what `tables()` returned or is an empty list,
        which is filled with it.

        `of_rows`: y is [1, N, d], the tokens of several rows without padding, with each token's row [N] and how many
        rows there are.
        """
        if isinstance(y, kernels.Unfinished):
            assert tables is not None
            if not tables:
                tables.append(self.tables())
            return kernels.calibrate(y, self.projection.float(), self.reinjection.float(), tables[0])
        if steps:
            p = steps[0]
        else:
            assert gates is not None
            p = self.gated_step(gates.float(), count)
            if steps is not None:
                steps.append(p)
        wide, reinjection = y.float(), self.reinjection.float()
        z = linear(wide, self.projection.float(), p.bias)
        weights = p.shift.weights(z[..., : p.shift.into.shape[-2]])
        weights = (weights if p.gates is None else weights * p.gates).flatten(-2)
        # λ₁·Fractal(z) + λ₂·Natural(z), with both terms in −z as one
        step = torch.addcmul(p.rest, z, p.damping)
        step = step + weights @ p.back if p.back.dim() == 2 else torch.baddbmm(step, weights, p.back)
        if self.training:
            change = linear(step, reinjection)
            moved, energy = (_by_row(t, token_mask, of_rows) for t in (change, y.detach().float()))
            drift = moved / energy.clamp_min(1e-12)
            self.last_drift = self.last_drift if is_recomputing() else drift
        calibrated = torch.addmm(wide.flatten(0, 1), step.flatten(0, 1), reinjection.T)
        return calibrated.view_as(y).to(y.dtype)


def _by_row(vectors: Tensor, token_mask: Tensor | None, of_rows: tuple[Tensor, int] | None) -> Tensor:
    """Squared lengths of the tokens' vectors, summed over each row without padding, [B]."""
    squares = vectors.square().sum(-1)
    if of_rows is not None:
        row, rows = of_rows
        return squares.new_zeros(rows).index_add(0, row, squares.squeeze(0))
    return (squares if token_mask is None else squares * token_mask.float()).sum(-1)
