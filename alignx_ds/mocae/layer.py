"""The AlignX layer, which takes the place of a decoder layer's FFN.

Shapes: B rows, T tokens, d hidden size, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alignx_ds.mocae import grouped, kernels
from alignx_ds.mocae.attention import RoutedLinear
from alignx_ds.mocae.fused import FusedMixture, RowExpert
from alignx_ds.mocae.gate import CalibratedGate, Query
from alignx_ds.mocae.output_calibration import OutputCalibration
from alignx_ds.mocae.recomputation import is_recomputing
from alignx_ds.mocae.routing_state import Counts, ForwardPass, Routing, prompt_summary
from alignx_ds.mocae.serving import ServingRules
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.mocae.unchanged import UnchangedFfn

if TYPE_CHECKING:  # a model on one rank runs without it
    from alignx_ds.mocae.parallel import ParallelMixture


class AlignXLayer(nn.Module):
    """ỹ = OutputCalibration(Σᵢ gᵢ · FFNᵢ(x), g): gates, a mixture of experts, and the calibration of its output.

    The gates g come from the layer's own gate, from the gate of a lower layer, or from the caller (`forced`). This is
    the AlignX layer of arXiv 2602.07381 in our formulation (docs/method.md). Without a calibration
    (`gate.output_latent: 0`) it returns the mixture as it is. Where the FFN is a mixture of experts already, every FFNᵢ
    is that FFN.
    """

    def __init__(
        self,
        ffn: nn.Module,
        mixture: FusedMixture | ParallelMixture | UnchangedFfn,
        calibration: OutputCalibration | None,
        gate: CalibratedGate | None,
        index: int,
        settings: GateSettings,
        gate_layer: int,
        forward_pass: ForwardPass,
        rules: ServingRules,
    ) -> None:
        super().__init__()
        self.ffn = ffn  # the backbone's own module: the generalist, and what every expert shares
        self.mixture = mixture
        self.calibration = calibration
        self.gate = gate
        self.index, self.gate_layer = index, gate_layer
        self.settings, self.rules = settings, rules
        self._forward_pass = forward_pass

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, d] in the dtype of x; the routing of the forward pass is read and added to."""
        routing = self._forward_pass.routing
        assert routing is not None, "an AlignX layer runs inside AlignXForCausalLM.forward"
        known = routing.rows.get(self.gate_layer) or routing.groups.get(self.gate_layer)
        if known is not None and known.serve(x):
            return self._of_one_expert(x, known, routing)
        gates = self._gates(x, routing)
        count, axes = self._counts(gates, routing)
        mask = self._forward_pass.token_mask
        if self._forward_pass.tokens is not None:
            return self._without_padding(x, gates, self._forward_pass.tokens)
        if isinstance(self.mixture, FusedMixture):
            known = self._rows(x, gates, count, routing) or self._groups(x, gates, count, routing)
            if known is not None:
                return self._of_one_expert(x, known, routing)
            # Only calls: where accelerate keeps weights off the device, its hooks fetch them before a module is called.
            y: Tensor = self.mixture(x, gates, count, self._gathered(gates, count, axes, routing), axes=axes)
        else:
            y = self.mixture(x, gates, mask)
        if self.calibration is None:
            return y
        # What the gates alone determine is kept with the KV cache, but not in training, where it has gradients.
        steps = None if torch.is_grad_enabled() else routing.steps.setdefault(self.index, [])
        calibrated: Tensor = self.calibration(y, gates, mask, count, steps)
        return calibrated

    def _of_one_expert(self, x: Tensor, known: kernels.Rows | grouped.Groups, routing: Routing) -> Tensor:
        """The layer's output where each row has one expert: what decides it is known, and no gradients are needed."""
        y: Tensor | kernels.Unfinished = self.mixture(x, known)
        if isinstance(y, kernels.Unfinished):
            if self.calibration is None:
                return kernels.finished(y)
            whole: Tensor = self.calibration(y, tables=routing.tables.setdefault(self.index, []))
            return whole
        if self.calibration is None:
            return y
        steps = routing.steps.setdefault(self.index, [])
        gates = None if steps else self._gates(x, routing)
        calibrated: Tensor = self.calibration(y, gates, self._forward_pass.token_mask, 1, steps)
        return calibrated

    def _without_padding(self, x: Tensor, gates: Tensor, tokens: Tensor) -> Tensor:
        """The layer's output in training on the fused path, 0 on padding, which is left out of the computation.

        Expert parallelism does not dispatch it either. `tokens` [N] are the places of the others in [B T].
        """
        b, t, d = x.shape
        own = gates.expand(b, t, -1).flatten(0, 1).index_select(0, tokens).unsqueeze(0)  # [1, N, E]
        y: Tensor = self.mixture(x.flatten(0, 1).index_select(0, tokens).unsqueeze(0), own)
        if self.calibration is not None:
            y = self.calibration(y, own, of_rows=(tokens // t, b))
        return y.new_zeros(b * t, d).index_copy(0, tokens, y.squeeze(0)).view(b, t, d)

    def _rows(self, x: Tensor, gates: Tensor, count: int | None, routing: Routing) -> kernels.Rows | None:
        """The only expert of each row, where the Triton kernels can run; kept with the KV cache."""
        assert isinstance(self.mixture, FusedMixture)
        if not kernels.supported(x, gates, count, self.mixture.activation):
            return None
        made = kernels.Rows(gates.squeeze(1).argmax(-1).int())
        routing.rows[self.gate_layer] = made
        return made

    def _groups(self, x: Tensor, gates: Tensor, count: int | None, routing: Routing) -> grouped.Groups | None:
        """The rows by expert, where each has one and they can be grouped; kept with the KV cache."""
        if self._forward_pass.fixed or not grouped.groupable(x, gates, count):
            return None
        made = grouped.Groups.of(gates)
        routing.groups[self.gate_layer] = made
        return made

    def _counts(self, gates: Tensor, routing: Routing) -> tuple[int | None, int | None]:
        """Upper bounds of a row's non-zero gates and, in needs, of the axes among them; None where they are unknown."""
        experts, needs = gates.shape[-1], self.settings.kind == "needs"
        if routing.forced_counts is not None and routing.forced_counts.gates:
            counts = routing.forced_counts
        elif self.gate_layer in routing.counts:
            counts = routing.counts[self.gate_layer]
        elif self.training:
            return None, None
        else:
            most = self.rules.served_by(self.settings, experts)
            if not needs:
                return most, None
            counts = routing.counted(self.gate_layer, Counts(most, min(most, experts - 1)), self._forward_pass.fixed)
        return counts.gates, counts.axes if needs else None

    def _gathered(self, gates: Tensor, count: int | None, axes: int | None, routing: Routing) -> list[RowExpert] | None:
        """Each row's own factors, gathered at prefill and kept with the KV cache, where they are fewer than all."""
        assert isinstance(self.mixture, FusedMixture)
        if torch.is_grad_enabled() or count is None or not self.mixture.fewer_by_row(len(gates), count, axes):
            return None
        return routing.gathered.setdefault(self.index, [])

    def _gates(self, x: Tensor, routing: Routing) -> Tensor:
        """[B, 1, E] fp32 on the device of x: as forced, as decided earlier, or decided now by this layer's gate."""
        again = self.training and is_recomputing()
        if self.gate is not None and (again or self.gate_layer not in routing.decisions):
            query = Query(prompt_summary(x, routing.query_mask), routing.words.to(x.device))
            decision = self.gate(query) if again else routing.decide(self.gate_layer, query, self.gate)
        else:
            decision = routing.decisions[self.gate_layer]
        gates = routing.forced if routing.forced is not None else decision.gates
        return (gates if gates.device == x.device else gates.to(x.device)).unsqueeze(1)


def freeze_trunk(model: nn.Module, *, experts: bool = True) -> None:
    """Switch gradients off but for what stage 2 trains: routers, output calibrations and, if `experts`, the factors."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, AlignXLayer):
            module.mixture.requires_grad_(experts)
            for part in (module.calibration, module.gate):
                if part is not None:
                    part.requires_grad_(True)
        elif isinstance(module, RoutedLinear):
            for parameter in module.trained():
                parameter.requires_grad_(experts)


def alignx_layers(model: nn.Module) -> list[AlignXLayer]:
    """The AlignX layers of a model, lowest first."""
    return [m for m in model.modules() if isinstance(m, AlignXLayer)]


def output_calibrations(model: nn.Module) -> list[OutputCalibration]:
    """Those of the AlignX layers, lowest first; none where `gate.output_latent` is 0."""
    return [layer.calibration for layer in alignx_layers(model) if layer.calibration is not None]


def gates_of(model: nn.Module) -> dict[int, CalibratedGate]:
    """The gates of a model by the index of the decoder layer that holds each, lowest first."""
    return {layer.gate_layer: layer.gate for layer in alignx_layers(model) if layer.gate is not None}
