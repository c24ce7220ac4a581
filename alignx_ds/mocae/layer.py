"""The AlignX layer: takes the place of a decoder layer's FFN.

Shapes: B rows, T tokens, d hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alignx_ds.mocae import kernels
from alignx_ds.mocae.fused import FusedMixture, Pick
from alignx_ds.mocae.gate import CalibratedGate, Query
from alignx_ds.mocae.output_calibration import OutputCalibration
from alignx_ds.mocae.parallel import ParallelMixture
from alignx_ds.mocae.routing import Channel, Routing, prompt_summary


class AlignXLayer(nn.Module):
    """gate (or the gate of a layer below) -> mixture of experts -> output calibration."""

    def __init__(
        self,
        ffn: nn.Module,
        mixture: FusedMixture | ParallelMixture,
        calibration: OutputCalibration,
        gate: CalibratedGate | None,
        index: int,
        top_k: int,
        gate_layer: int,
        channel: Channel,
    ) -> None:
        super().__init__()
        self.ffn = ffn  # the backbone's own module: the generalist, and what every expert shares
        self.mixture = mixture
        self.calibration = calibration
        self.gate = gate
        self.index, self.top_k, self.gate_layer = index, top_k, gate_layer
        self._channel = channel

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        routing = self._channel.routing
        assert routing is not None, "an AlignX layer runs inside AlignXForCausalLM.forward"
        gates = self._gates(x, routing)
        mask = self._channel.token_mask
        count = routing.forced_count or (None if self.training else self.top_k)
        experts = self._experts(x, gates, count, routing)
        # Modules are called, never asked: where accelerate keeps weights off the device, a call fetches them.
        if isinstance(self.mixture, ParallelMixture):
            y = self.mixture(x, gates, mask)
        elif experts is not None:
            y = self.mixture(x, gates, count, experts=experts)
        else:
            y = self.mixture(x, gates, count, self._picks(gates, count, routing))
        # Kept with the KV cache; not in training: it has gradients.
        pulls = None if torch.is_grad_enabled() else routing.pulls.setdefault(self.index, [])
        tables = routing.tables.setdefault(self.index, []) if experts is not None else None
        calibrated: Tensor = self.calibration(y, gates, mask, count, pulls, experts, tables)
        return calibrated

    def _experts(self, x: Tensor, gates: Tensor, count: int | None, routing: Routing) -> Tensor | None:
        """[B] int32, every row's only expert, where there are kernels for that; kept with the KV cache."""
        if isinstance(self.mixture, ParallelMixture) or not kernels.serve(x, gates, count, self.mixture.activation):
            return None
        found = routing.experts.get(self.gate_layer)
        if found is None or found.device != x.device:
            found = gates.squeeze(1).argmax(-1).int()
            routing.experts[self.gate_layer] = found
        return found

    def _picks(self, gates: Tensor, count: int | None, routing: Routing) -> list[Pick] | None:
        """The rows' own factors: gathered at prefill, kept with the KV cache, where they are fewer than all."""
        assert isinstance(self.mixture, FusedMixture)
        if torch.is_grad_enabled() or count is None or not self.mixture.few_rows(len(gates), count):
            return None
        return routing.picks.setdefault(self.index, [])

    def _gates(self, x: Tensor, routing: Routing) -> Tensor:
        """[B, 1, E], on this layer's own device: from the gate, from what it decided at prefill, or as forced."""
        if self.gate is not None and self.gate_layer not in routing.decisions:
            query = Query(prompt_summary(x, routing.prompt_mask), routing.words.to(x.device))
            routing.queries[self.gate_layer] = query
            routing.decisions[self.gate_layer] = self.gate(query)
        gates = routing.forced if routing.forced is not None else routing.decisions[self.gate_layer].gates
        return gates.unsqueeze(1).to(x.device)


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
