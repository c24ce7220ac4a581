"""An expert: the shared base FFN with its own low-rank change of each of the three projections.

Shapes: d hidden size, f FFN size, r rank, E experts. A projection W [m, n] of expert i is W + up_i @ down_i with
down_i [r, n] and up_i [m, r]; a full-rank expert has r = min(m, n). [m, n] is [f, d] for gate and up, [d, f] for down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

PROJECTIONS = ("gate", "up", "down")  # of the FFN
ATTENTION = ("q", "k", "v", "o")  # those of the attention that an expert may change too (attention.py)


@dataclass(frozen=True)
class FeedForward:
    """A view of a backbone's gated FFN, y = down(activation(gate(x)) * up(x)), whose modules it shares."""

    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: nn.Module

    def projection(self, name: str) -> nn.Linear:
        """One of PROJECTIONS."""
        assert name in PROJECTIONS
        layer: nn.Linear = getattr(self, name)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.gate.weight.dtype


@dataclass(frozen=True)
class Factors:
    """The low-rank factors of one expert in one layer: `down[p]` [r, n] and `up[p]` [m, r] by projection p.

    Those of the FFN are always there, unless the FFN is a mixture of experts already; those of the attention where the
    expert changes it.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]

    def delta(self, projection: str) -> Tensor:
        """The change of the projection's weight, up @ down, [m, n]."""
        return self.up[projection] @ self.down[projection]

    def rank(self, projection: str) -> int:
        """r of a projection, which may differ between projections."""
        return self.down[projection].shape[0]

    def padded(self, ranks: dict[str, int]) -> Factors:
        """The same changes; those of the FFN have factors of these ranks, filled up with zeros, and can be stacked."""
        down = self.down | {p: _pad(self.down[p], rank, dim=0) for p, rank in ranks.items()}
        up = self.up | {p: _pad(self.up[p], rank, dim=1) for p, rank in ranks.items()}
        return Factors(down, up)

    @classmethod
    def zeros(cls, ffn: FeedForward, ranks: dict[str, int]) -> Factors:
        """The generalist, which changes nothing: fp32 zeros of the FFN's shapes and these ranks.

        If both factors are zero so are their gradients, so that training leaves them at zero.
        """
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
    """Every expert of a layer, padded to the largest rank among them, projection by projection."""
    ranks = {p: max(e.rank(p) for e in experts) for p in PROJECTIONS if p in experts[0].down}
    return [e.padded(ranks) for e in experts]


class LowRankExpert(nn.Module):
    """One expert as DeepSpeed's MoE layer hosts it. The base FFN is shared, so it is attached and not registered."""

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.ParameterDict({p: nn.Parameter(factors.down[p].to(dtype)) for p in PROJECTIONS})
        self.up = nn.ParameterDict({p: nn.Parameter(factors.up[p].to(dtype)) for p in PROJECTIONS})
        self._base: list[FeedForward] = []  # a list hides the shared modules from nn.Module's registration

    def attach(self, base: FeedForward) -> None:
        """Set the shared base FFN; to be called once before `forward`."""
        self._base = [base]

    def load(self, factors: Factors) -> None:
        """Copy the values of factors of the same ranks."""
        with torch.no_grad():
            for p in PROJECTIONS:
                self.down[p].copy_(factors.down[p])
                self.up[p].copy_(factors.up[p])

    def factors(self) -> Factors:
        """Detached copies."""
        return Factors(
            down={p: self.down[p].detach().clone() for p in PROJECTIONS},
            up={p: self.up[p].detach().clone() for p in PROJECTIONS},
        )

    def _project(self, name: str, x: Tensor) -> Tensor:
        shared: Tensor = self._base[0].projection(name)(x)
        return shared + linear(linear(x, self.down[name]), self.up[name])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> down(activation(gate(x)) * up(x)) [..., d], with the changed projections."""
        activated = self._base[0].activation(self._project("gate", x)) * self._project("up", x)
        return self._project("down", activated)
