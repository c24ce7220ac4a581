"""What an expert is: the shared base FFN plus its own low-rank change of each of the three projections.

Shapes: d hidden size, f FFN size, r rank, E experts. A projection W [m, n] of expert i is W + up_i @ down_i with
down_i [r, n], up_i [m, r]; a full-rank expert has r = min(m, n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class FeedForward:
    """A view of a backbone's gated FFN: y = down(act(gate(x)) * up(x)). Holds no state of its own."""

    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: nn.Module

    def projection(self, name: str) -> nn.Linear:
        assert name in PROJECTIONS
        layer: nn.Linear = getattr(self, name)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        return self.gate.weight.dtype


@dataclass(frozen=True)
class Factors:
    """One layer's low-rank factors of one expert: `down[p]` [r, n] and `up[p]` [m, r] per projection p."""

    down: dict[str, Tensor]
    up: dict[str, Tensor]

    def delta(self, projection: str) -> Tensor:
        """The change of the weight, [m, n]."""
        return self.up[projection] @ self.down[projection]

    def rank(self, projection: str) -> int:
        return self.down[projection].shape[0]

    def padded(self, ranks: dict[str, int]) -> Factors:
        """The same change with zero rows and columns up to the given ranks, so that experts can be stacked."""
        down = {p: _pad(self.down[p], ranks[p], dim=0) for p in PROJECTIONS}
        up = {p: _pad(self.up[p], ranks[p], dim=1) for p in PROJECTIONS}
        return Factors(down, up)

    @classmethod
    def zeros(cls, ffn: FeedForward, ranks: dict[str, int]) -> Factors:
        """The generalist: no change at all. Zero factors have zero gradients, so training leaves them at zero."""
        weights = {p: ffn.projection(p) for p in PROJECTIONS}
        down = {p: torch.zeros(ranks[p], w.in_features) for p, w in weights.items()}
        up = {p: torch.zeros(w.out_features, ranks[p]) for p, w in weights.items()}
        return cls(down, up)


def _pad(tensor: Tensor, size: int, dim: int) -> Tensor:
    missing = size - tensor.shape[dim]
    assert missing >= 0, "a rank can't shrink by padding"
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def align_ranks(experts: list[Factors]) -> list[Factors]:
    """Pad every expert of a layer to the largest rank among them, projection by projection."""
    ranks = {p: max(e.rank(p) for e in experts) for p in PROJECTIONS}
    return [e.padded(ranks) for e in experts]


class LowRankExpert(nn.Module):
    """One expert as DeepSpeed's MoE hosts it. The base FFN is shared, so it is attached, not registered."""

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.ParameterDict({p: nn.Parameter(factors.down[p].to(dtype)) for p in PROJECTIONS})
        self.up = nn.ParameterDict({p: nn.Parameter(factors.up[p].to(dtype)) for p in PROJECTIONS})
        self._base: list[FeedForward] = []  # a list hides the shared modules from nn.Module's registration

    def attach(self, base: FeedForward) -> None:
        self._base = [base]

    def load(self, factors: Factors) -> None:
        with torch.no_grad():
            for p in PROJECTIONS:
                self.down[p].copy_(factors.down[p])
                self.up[p].copy_(factors.up[p])

    def factors(self) -> Factors:
        return Factors(
            down={p: self.down[p].detach().clone() for p in PROJECTIONS},
            up={p: self.up[p].detach().clone() for p in PROJECTIONS},
        )

    def _project(self, name: str, x: Tensor) -> Tensor:
        shared: Tensor = self._base[0].projection(name)(x)
        return shared + linear(linear(x, self.down[name]), self.up[name])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        activated = self._base[0].activation(self._project("gate", x)) * self._project("up", x)
        return self._project("down", activated)
