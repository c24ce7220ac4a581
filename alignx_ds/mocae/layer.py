"""The AlignX layer: takes the place of a decoder layer's FFN.

Shapes: B rows, T tokens, d hidden, E experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.gate import CalibratedGate, Query
from alignx_ds.mocae.output_calibration import OutputCalibration
from alignx_ds.mocae.parallel import ParallelMixture
from alignx_ds.mocae.routing import Channel, prompt_summary


class AlignXLayer(nn.Module):
    """gate (or the gate of a layer below) -> mixture of experts -> output calibration."""

    def __init__(
        self,
        ffn: nn.Module,
        mixture: FusedMixture | ParallelMixture,
        calibration: OutputCalibration,
        gate: CalibratedGate | None,
        gate_layer: int,
        channel: Channel,
    ) -> None:
        super().__init__()
        self.ffn = ffn  # the backbone's own module: the generalist, and what every expert shares
        self.mixture = mixture
        self.calibration = calibration
        self.gate = gate
        self.gate_layer = gate_layer
        self._channel = channel

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        gates = self._gates(x)
        routing = self._channel.routing
        forced = routing is not None and routing.forced is not None
        y = self.mixture(x, gates, self._channel.token_mask, forced)
        calibrated: Tensor = self.calibration(y, gates, self._channel.token_mask)
        return calibrated

    def _gates(self, x: Tensor) -> Tensor:
        """[B, 1, E]: from the gate, from what it decided at prefill, or as forced."""
        routing = self._channel.routing
        assert routing is not None, "an AlignX layer runs inside AlignXForCausalLM.forward"
        if self.gate is not None and self.gate_layer not in routing.decisions:
            query = Query(prompt_summary(x, routing.prompt_mask), routing.words)
            routing.queries[self.gate_layer] = query
            routing.decisions[self.gate_layer] = self.gate(query)
        gates = routing.forced if routing.forced is not None else routing.decisions[self.gate_layer].gates
        return gates.unsqueeze(1)


def freeze_trunk(model: nn.Module) -> None:
    """Leave only what stage 2 may train: routers, output calibrations and the experts' factors."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, AlignXLayer):
            module.mixture.requires_grad_(True)
            module.calibration.requires_grad_(True)
            if module.gate is not None:
                module.gate.requires_grad_(True)


def alignx_layers(model: nn.Module) -> list[AlignXLayer]:
    """The AlignX layers of a model, lowest first."""
    return [m for m in model.modules() if isinstance(m, AlignXLayer)]


def gates_of(model: nn.Module) -> dict[int, CalibratedGate]:
    """The gates of a model, by the layer that owns each, lowest first."""
    return {layer.gate_layer: layer.gate for layer in alignx_layers(model) if layer.gate is not None}
