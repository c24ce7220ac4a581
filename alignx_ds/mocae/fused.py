"""The fused path: all experts local, the base GEMMs run once for all of them, no dispatch and no padding.

Shapes: B rows, T tokens, d hidden, f FFN, S specialists (E = S + 1 experts with the generalist), r rank. Equal to the
expert-parallel path (DESIGN invariant 3). docs/performance.md says what each way of mixing costs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from alignx_ds.mocae import kernels
from alignx_ds.mocae.experts import Factors, FeedForward

STACKS = ("down_in", "up_in", "down_out", "up_out")


class Pick(NamedTuple):
    """The factors of one expert per row, gathered: nothing need be read of the experts that a row did not choose."""

    weight: Tensor  # [B, 1, 1] the gate
    down_in: Tensor  # [B, 2r, d], zero where the choice is the generalist, which has no factors
    up_in: Tensor  # [2, B, r, f]
    down_out: Tensor  # [B, r, f], likewise
    up_out: Tensor  # [B, r, d]


class FusedMixture(nn.Module):
    """y = W_d Σᵢ gᵢ actᵢ + Σᵢ gᵢ U_d,i D_d,i actᵢ, with the experts' factors stacked.

    Expert 0 is the generalist, the base FFN itself: it has no factors, and none are stored for it. The gate and up
    projections share their input, so their down factors are one matrix.
    """

    def __init__(self, base: FeedForward, experts: list[Factors]) -> None:
        """`experts` by global id; the first one's factors are taken to be zero."""
        super().__init__()
        self.num_experts = len(experts)
        self._base = [base]  # a list hides the shared modules from nn.Module's registration
        for name, tensor in stack(experts[1:]).items():
            self.register_parameter(name, nn.Parameter(tensor.to(base.dtype)))

    down_in: Tensor  # [2, S, r, d]
    up_in: Tensor  # [2, S, r, f]
    down_out: Tensor  # [S, r, f]
    up_out: Tensor  # [S, r, d]

    @property
    def activation(self) -> nn.Module:
        return self._base[0].activation

    def factors(self) -> list[Factors]:
        """The experts' factors, by global expert id."""
        specialists = unstack({name: getattr(self, name).detach() for name in STACKS})
        like = specialists[0]
        none = Factors(
            {p: torch.zeros_like(t) for p, t in like.down.items()}, {p: torch.zeros_like(t) for p, t in like.up.items()}
        )
        return [none, *specialists]

    def forward(
        self,
        x: Tensor,
        gates: Tensor,
        count: int | None = None,
        picks: list[Pick] | None = None,
        experts: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, d], gates [B, T or 1, E] fp32 summing to one -> [B, T, d].

        `count` says how many experts have a gate in a row, when that is known; `picks` are a prompt's own, made before,
        or an empty list that is to hold them. `experts` [B] are the rows' only ones, where kernels.serve says so.
        """
        if experts is not None:
            return kernels.mixture(x, self._base[0], self, experts)
        if count is None:
            count = self.num_experts
        if picks is None and self._picks_pay(x, gates, count):
            picks = []
        if picks is not None and not picks:
            picks += self.pick(gates, count)
        gates = gates.to(x.dtype)
        if picks is not None:
            return self._picked(x, picks)
        return self._one_expert(x, gates) if count == 1 else self._every_expert(x, gates)

    def few_rows(self, rows: int, count: int) -> bool:
        """Whether the rows' own factors are fewer than all experts': while decoding, bytes are time."""
        return rows * count < self.num_experts - 1

    def _picks_pay(self, x: Tensor, gates: Tensor, count: int) -> bool:
        """A row's decision covers enough tokens to be worth gathering for, and leaves some expert out."""
        return gates.shape[1] == 1 and x.shape[1] > 1 and count < self.num_experts - 1

    def pick(self, gates: Tensor, count: int) -> list[Pick]:
        """gates [B, 1, E] -> every row's `count` best experts, without asking the device which they are."""
        weights, experts = gates.squeeze(1).topk(count, dim=-1)
        dtype, picks = self.down_in.dtype, []
        for weight, expert in zip(weights.unbind(-1), experts.unbind(-1), strict=True):
            place, kept = (expert - 1).clamp_min(0), (expert > 0).to(dtype)[:, None, None]
            picks.append(
                Pick(
                    weight=weight.to(dtype)[:, None, None],
                    down_in=self.down_in.transpose(0, 1).index_select(0, place).flatten(1, 2) * kept,
                    up_in=self.up_in.index_select(1, place),
                    down_out=self.down_out.index_select(0, place) * kept,
                    up_out=self.up_out.index_select(0, place),
                )
            )
        return picks

    def _picked(self, x: Tensor, picks: list[Pick]) -> Tensor:
        base = self._base[0]
        gate, up = base.gate(x), base.up(x)
        if len(picks) == 1:
            act = self._own_activation(x, gate, up, picks[0], in_place=True)
            out: Tensor = base.down(act)
            return out.baddbmm_(act @ picks[0].down_out.mT, picks[0].up_out)
        acts = [self._own_activation(x, gate, up, pick) for pick in picks]
        y: Tensor = base.down(torch.stack([a * p.weight for a, p in zip(acts, picks, strict=True)]).sum(0))
        for act, pick in zip(acts, picks, strict=True):
            y.baddbmm_((act @ pick.down_out.mT) * pick.weight, pick.up_out)
        return y

    def _own_activation(self, x: Tensor, gate: Tensor, up: Tensor, pick: Pick, in_place: bool = False) -> Tensor:
        """Of the rows' own experts; `gate` and `up` are the base's pre-activations, used up if `in_place`."""
        to_gate, to_up = (x @ pick.down_in.mT).chunk(2, dim=-1)
        add = Tensor.baddbmm_ if in_place else torch.baddbmm
        activated: Tensor = self._base[0].activation(add(gate, to_gate, pick.up_in[0]))
        return activated * add(up, to_up, pick.up_in[1])

    def _one_expert(self, x: Tensor, one_hot: Tensor) -> Tensor:
        """One activation per token: masking the stacked latent with the one-hot gates picks each token's expert."""
        base, own = self._base[0], one_hot[..., 1:, None]  # [B, T or 1, S, 1]
        latent = torch.unflatten(linear(x, self.down_in.flatten(0, 2)), -1, self.down_in.shape[:3])
        latent = (latent * own.unsqueeze(-3)).flatten(-2).flatten(0, 1).transpose(0, 1)  # [2, B T, S r]
        inward = torch.stack([base.gate(x), base.up(x)]).flatten(1, 2)
        gate, up = inward.baddbmm_(latent, self.up_in.flatten(1, 2))  # a CPU does both at once in 2/3 of the time
        act = (base.activation(gate) * up).unflatten(0, x.shape[:2])
        return _plus(base.down(act), self._outward(act) * own, self.up_out)

    def _every_expert(self, x: Tensor, gates: Tensor) -> Tensor:
        base = self._base[0]
        gate, up = base.gate(x), base.up(x)
        latent = torch.unflatten(linear(x, self.down_in.flatten(0, 2)), -1, self.down_in.shape[:3])
        weights = gates.unsqueeze(-1).unbind(-2)  # E of [B, T or 1, 1]
        mixed, latents = weights[0] * (base.activation(gate) * up), []
        for s, weight in enumerate(weights[1:]):
            to_gate, to_up = latent[..., s, :].unbind(-2)
            pre_gate, pre_up = (
                torch.addmm(shared.flatten(0, -2), own.flatten(0, -2), factor).view_as(shared)
                for shared, own, factor in ((gate, to_gate, self.up_in[0, s]), (up, to_up, self.up_in[1, s]))
            )
            act = base.activation(pre_gate) * pre_up
            mixed = mixed + weight * act
            latents.append(weight * linear(act, self.down_out[s]))
        return _plus(base.down(mixed), torch.stack(latents, dim=-2), self.up_out)

    def _outward(self, act: Tensor) -> Tensor:
        """act [B, T, f] -> its latent under every specialist, [B, T, S, r]."""
        return torch.unflatten(linear(act, self.down_out.flatten(0, 1)), -1, self.down_out.shape[:2])


def _plus(shared: Tensor, latent: Tensor, up: Tensor) -> Tensor:
    """shared [B, T, m], a projection's fresh output, += Σₛ latentₛ Uₛ: latent [B, T, S, r], up [S, r, m]."""
    shared.view(-1, shared.shape[-1]).addmm_(latent.flatten(-2).flatten(0, -2), up.flatten(0, 1))
    return shared


def stack(specialists: list[Factors]) -> dict[str, Tensor]:
    """The parameters of a `FusedMixture`, by name; of smaller ranks, padded with zeros."""
    ranks = {p: max(f.rank(p) for f in specialists) for p in ("gate", "up", "down")}
    inward = max(ranks["gate"], ranks["up"])
    padded = [f.padded({**ranks, "gate": inward, "up": inward}) for f in specialists]
    return {
        "down_in": torch.stack([torch.stack([f.down[p] for f in padded]) for p in ("gate", "up")]),
        "up_in": torch.stack([torch.stack([f.up[p].T for f in padded]) for p in ("gate", "up")]),
        "down_out": torch.stack([f.down["down"] for f in padded]),
        "up_out": torch.stack([f.up["down"].T for f in padded]),
    }


def unstack(stacks: dict[str, Tensor]) -> list[Factors]:
    """The specialists' factors that `stack` was given, padding included."""
    return [
        Factors(
            down={"gate": a.clone(), "up": b.clone(), "down": outward.clone()},
            up={"gate": g.T.clone(), "up": u.T.clone(), "down": o.T.clone()},
        )
        for a, b, outward, g, u, o in zip(
            *stacks["down_in"], stacks["down_out"], *stacks["up_in"], stacks["up_out"], strict=True
        )
    ]
