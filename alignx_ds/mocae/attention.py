"""Experts' changes of the attention's projections, mixed by the gate of the AlignX layers.

Shapes: B rows, T tokens, S specialists, r rank; a projection is [m, n]. The gate decides within the FFN of the lowest
AlignX layer, so only the attention of the layers above it can be changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from alignx_ds.mocae.experts import Factors
from alignx_ds.mocae.routing_state import ForwardPass


class RoutedLinear(nn.Linear):
    """y = W x + Σᵢ gᵢ Uᵢ Dᵢ x: a linear layer in another's place, with that one's own weight and bias.

    g are the row's gates, as in the AlignX layers. A change of weights is linear, so it does not matter whether outputs
    or weights are mixed. All specialists' factors are read; the generalist has none. Padded ranks are zero in both
    factors, and so are their gradients.
    """

    experts_down: Tensor  # [S r, n]
    experts_up: Tensor  # [m, S r]

    def __init__(
        self, base: nn.Linear, factors: Sequence[tuple[Tensor, Tensor]], gate_layer: int, forward_pass: ForwardPass
    ) -> None:
        """`factors` (D [r, n], U [m, r]) by specialist, all of one rank."""
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.specialists, self.gate_layer, self._forward_pass = len(factors), gate_layer, forward_pass
        downs, ups = torch.cat([down for down, _ in factors]), torch.cat([up for _, up in factors], dim=1)
        self.experts_down = nn.Parameter(downs.to(base.weight.dtype))
        self.experts_up = nn.Parameter(ups.to(base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, n] -> [B, T, m] in the dtype of x."""
        routing = self._forward_pass.routing
        assert routing is not None, "it runs inside AlignXForCausalLM.forward"
        gates = routing.forced if routing.forced is not None else routing.decisions[self.gate_layer].gates
        weights = gates[:, None, 1:, None].to(device=x.device, dtype=x.dtype)  # [B, 1, S, 1]
        latents = linear(x, self.experts_down)
        weighted = latents.view(*latents.shape[:-1], self.specialists, -1) * weights
        return super().forward(x) + linear(weighted.flatten(-2), self.experts_up)

    def trained(self) -> list[nn.Parameter]:
        """What stage 2 may train of it."""
        return [p for p in (self.experts_down, self.experts_up) if isinstance(p, nn.Parameter)]

    def factors(self, specialist: int) -> tuple[Tensor, Tensor]:
        """Detached copies of (D [r, n], U [m, r]); the first specialist is 0."""
        down = self.experts_down.detach().view(self.specialists, -1, self.in_features)[specialist]
        up = self.experts_up.detach().view(self.out_features, self.specialists, -1)[:, specialist]
        return down.clone(), up.clone()


def padded(factors: Factors, projection: str, rank: int, module: nn.Linear) -> tuple[Tensor, Tensor]:
    """(D, U) of a projection with this rank, filled up with zeros; all zeros where the expert does not change it."""
    if projection not in factors.down:
        return torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank)
    missing = rank - factors.rank(projection)
    return pad(factors.down[projection], (0, 0, 0, missing)), pad(factors.up[projection], (0, missing))


def routed_linears(model: nn.Module) -> list[RoutedLinear]:
    """Those of a model, in the order of its modules; none where no expert changes the attention."""
    return [module for module in model.modules() if isinstance(module, RoutedLinear)]
