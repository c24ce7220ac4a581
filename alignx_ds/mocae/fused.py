"""The fused path: all experts local, the base GEMMs run once for all of them, without dispatch or padding.

Shapes: B rows, T tokens, d hidden size, f FFN size, S specialists, E = S + 1 experts with the generalist, r rank.
It computes what the expert-parallel path computes (parallel.py), up to rounding. What each way of mixing costs is in
docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from alignx_ds.mocae import grouped, kernels
from alignx_ds.mocae.experts import PROJECTIONS, Factors, FeedForward
from alignx_ds.mocae.mixed_activations import mixed_activations

STACKS = ("down_in", "up_in", "down_out", "up_out")


class RowExpert(NamedTuple):
    """The factors of one expert per row, gathered, so that the experts that no row chose are not read."""

    weight: Tensor  # [B, 1, 1], the row's gate for this expert
    down_in: Tensor  # [B, 2r, d], zero where the expert is the generalist, which has no factors
    up_in: Tensor  # [2, B, r, f]
    down_out: Tensor  # [B, r, f], zero likewise
    up_out: Tensor  # [B, r, d]


class FusedMixture(nn.Module):
    """y = W_d Σᵢ gᵢ aᵢ + Σᵢ gᵢ U_d,i D_d,i aᵢ, with the specialists' factors stacked; our formulation (docs/method.md).

    aᵢ = act(W_g x + U_g,i D_g,i x) ∘ (W_u x + U_u,i D_u,i x) is expert i's activation, W the base FFN's projections,
    U_p,i D_p,i the change of projection p by expert i. Expert 0 is the generalist, the base FFN itself: it has no
    factors, and none are stored for it. The gate and up projections share their input, so their down factors are one
    stack. Factors have the dtype of the base's weights.

    Where ranks differ, the stacks are padded with zeros. Both factors of what is padded are zero, and so are their
    gradients, each of which is a product with the other factor: training leaves the padding at zero.

    With `merge` it mixes the weights and not the outputs: y = FFN with the weights W + Σᵢ gᵢ U_i D_i, one activation
    whatever the number of experts. Where one gate is 1 and the others are 0, both mixtures are the same.
    """

    def __init__(self, base: FeedForward, experts: list[Factors], merge: bool = False) -> None:
        """`experts` by global id; those of expert 0 are ignored, because the generalist changes nothing."""
        super().__init__()
        self.merge = merge
        self.num_experts = len(experts)
        self.ranks = {p: max(e.rank(p) for e in experts[1:]) for p in PROJECTIONS}
        self._base = [base]  # a list hides the shared modules from nn.Module's registration
        for name, tensor in stack(experts[1:]).items():
            self.register_parameter(name, nn.Parameter(tensor.to(base.dtype)))

    down_in: Tensor  # [2, S, r, d]
    up_in: Tensor  # [2, S, r, f]
    down_out: Tensor  # [S, r, f]
    up_out: Tensor  # [S, r, d]

    @property
    def activation(self) -> nn.Module:
        """The base FFN's activation function."""
        return self._base[0].activation

    def factors(self) -> list[Factors]:
        """Copies of the experts' factors by global id, zero for the generalist, with the stacks' common ranks."""
        specialists = unstack({name: getattr(self, name).detach() for name in STACKS})
        like = specialists[0]
        none = Factors(
            {p: torch.zeros_like(t) for p, t in like.down.items()}, {p: torch.zeros_like(t) for p, t in like.up.items()}
        )
        return [none, *specialists]

    def by_expert(self, name: str, whole: Tensor) -> dict[str, Tensor]:
        """Views of a tensor of the shape of the stack `name`, by expert and factor, e.g. "2.up.gate", without padding.

        The number is the expert's global id. Names and shapes are those of the expert's parameters on the
        expert-parallel path. Nothing is padded there but to the experts' largest rank, projection by projection.
        """
        side = name.split("_")[0]
        projections, by_projection = (("gate", "up"), whole) if name.endswith("in") else (("down",), whole[None])
        found = {}
        for p, specialists in zip(projections, by_projection, strict=True):
            for expert, factor in enumerate(specialists, start=1):
                own = factor[: self.ranks[p]]
                found[f"{expert}.{side}.{p}"] = own if side == "down" else own.T
        return found

    def forward(
        self,
        x: Tensor,
        gates: Tensor | kernels.Rows | grouped.Groups,
        count: int | None = None,
        gathered: list[RowExpert] | None = None,
        axes: int | None = None,
    ) -> Tensor | kernels.Unfinished:
        """x [B, T, d], gates [B, T or 1, E] fp32 that sum to one over E -> [B, T, d] in the dtype of x.

        `count` is an upper bound of the non-zero gates per row, `axes` of the specialists' among them; None where it is
        not known. `gathered` is what `gather` returned for these gates, or an empty list, which is filled with it.
        For rows of one expert each, which `gates` then names, the Triton kernels run, or on a CPU the rows are grouped.
        The kernels' output is unfinished: the output calibration finishes it, or `kernels.finished`.
        """
        if isinstance(gates, kernels.Rows):
            return kernels.mixture(x, self._base[0], self, gates)
        if isinstance(gates, grouped.Groups):
            return grouped.grouped_mixture(x, self._base[0], self, gates)
        if count is None:
            count = self.num_experts
        few = self.fewer_by_row(1, count, axes)
        if gathered is None and gates.shape[1] == 1 and x.shape[1] > 1 and few:
            gathered = []
        if gathered is not None and not gathered:
            gathered += self.gather(gates, count, axes)
        gates = gates.to(x.dtype)
        if gathered is None:
            return self._merged(x, gates) if count == 1 or self.merge else self._every_expert(x, gates)
        if count == 1:
            return self._one_by_row(x, gathered[0])
        if self.merge:
            return self._merged_by_row(x, gathered[0])
        return self._several_by_row(x, gathered, None if axes is None else gates[..., :1])

    def fewer_by_row(self, rows: int, count: int, axes: int | None = None) -> bool:
        """Whether `rows` rows read fewer factors, each its own `count` experts' or `axes` specialists', than all have.

        Decoding is bound by memory bandwidth, so that fewer bytes mean less time.
        """
        return rows * self._slots(count, axes) < self.num_experts - 1

    def _slots(self, count: int, axes: int | None) -> int:
        """The number of experts per row whose factors are gathered."""
        return count if count == 1 or axes is None else axes

    def gather(self, gates: Tensor, count: int, axes: int | None = None) -> list[RowExpert]:
        """gates [B, 1, E] -> the `count` best experts of each row; the device is not synchronised with the host.

        If `axes` is given and `count` is not 1, the `axes` best specialists, without the generalist, which has no
        factors. With `merge`, several are one expert with their changes' weighted sum, whose rank is the ranks' sum.
        The best have the largest absolute gates: forced ones can be negative (the fixed weights of export/fidelity.py).
        """
        gates, slots = gates.squeeze(1), self._slots(count, axes)
        if count > 1 and (self.merge or axes is not None):
            experts = 1 + gates[:, 1:].abs().topk(min(slots, self.num_experts - 1), dim=-1).indices
        else:
            experts = gates.abs().topk(slots, dim=-1).indices
        weights, dtype = gates.gather(-1, experts), self.down_in.dtype
        if count > 1 and self.merge:
            return [self._sum(experts - 1, weights.to(dtype))]
        gathered = []
        for weight, expert in zip(weights.unbind(-1), experts.unbind(-1), strict=True):
            place, kept = (expert - 1).clamp_min(0), (expert > 0).to(dtype)[:, None, None]
            gathered.append(
                RowExpert(
                    weight=weight.to(dtype)[:, None, None],
                    down_in=self.down_in.transpose(0, 1).index_select(0, place).flatten(1, 2) * kept,
                    up_in=self.up_in.index_select(1, place),
                    down_out=self.down_out.index_select(0, place) * kept,
                    up_out=self.up_out.index_select(0, place),
                )
            )
        return gathered

    def _sum(self, places: Tensor, weights: Tensor) -> RowExpert:
        """The weighted sum of several specialists' changes: places, weights [B, K] -> factors of rank K r."""
        down_in = self.down_in[:, places] * weights[..., None, None]  # [2, B, K, r, d]
        return RowExpert(
            weight=torch.ones_like(weights[:, :1, None]),
            down_in=down_in.transpose(0, 1).flatten(1, 3),
            up_in=self.up_in[:, places].flatten(2, 3),
            down_out=(self.down_out[places] * weights[..., None, None]).flatten(1, 2),
            up_out=self.up_out[places].flatten(1, 2),
        )

    def _one_by_row(self, x: Tensor, own: RowExpert) -> Tensor:
        """The output of each row's only expert, [B, T, d]."""
        base = self._base[0]
        to_gate, to_up = (x @ own.down_in.mT).chunk(2, dim=-1)
        gate = base.activation(base.gate(x).baddbmm_(to_gate, own.up_in[0]))
        act = gate * base.up(x).baddbmm_(to_up, own.up_in[1])
        out: Tensor = base.down(act)
        return out.baddbmm_(act @ own.down_out.mT, own.up_out)

    def _merged_by_row(self, x: Tensor, own: RowExpert) -> Tensor:
        """The same, of the weighted sum of a row's experts; both pre-activations at once, as in `_merged`."""
        base = self._base[0]
        latent = torch.unflatten(x @ own.down_in.mT, -1, (2, -1)).movedim(-2, 0).flatten(0, 1)  # [2 B, T, K r]
        inward = torch.stack([base.gate(x), base.up(x)]).flatten(0, 1)
        gate, up = inward.baddbmm_(latent, own.up_in.flatten(0, 1)).chunk(2)
        act = base.activation(gate) * up
        out: Tensor = base.down(act)
        return out.baddbmm_(act @ own.down_out.mT, own.up_out)

    def _several_by_row(self, x: Tensor, gathered: list[RowExpert], generalist: Tensor | None) -> Tensor:
        """The mixture of each row's own experts' outputs, and of the generalist's with this weight [B, 1, 1]."""
        base = self._base[0]
        latents = [torch.unflatten(x @ own.down_in.mT, -1, (2, -1)).movedim(-2, 0).flatten(0, 1) for own in gathered]
        parts = [(own.up_in.flatten(0, 1), own.down_out, own.weight) for own in gathered]
        mixed, outward = self._mixed(torch.stack([base.gate(x), base.up(x)]), latents, parts, generalist)
        y: Tensor = base.down(mixed)
        for latent, own in zip(outward, gathered, strict=True):
            y.baddbmm_(latent, own.up_out)
        return y

    def _mixed(
        self,
        inward: Tensor,
        latents: Iterable[Tensor],
        parts: Sequence[tuple[Tensor, Tensor, Tensor]],
        generalist: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Σᵢ gᵢ aᵢ [B, T, f], with the generalist's own if its weight is given, and every gᵢ D_d,i aᵢ [B, T, r].

        `inward` [2, B, T, f] are the base's pre-activations, which are overwritten unless gradients are needed;
        `latents` [2 B, T, r] by expert; `parts` its up_in [2 B, r, f], down_out [B, r, f] or [r, f], and weight.
        """
        activation, rows = self._base[0].activation, inward.shape[1]
        both, in_place = inward.flatten(0, 1), not torch.is_grad_enabled()
        mixed = None if generalist is None else _times(activation(inward[0]) * inward[1], generalist)
        outward = []
        for i, (latent, (up_in, down_out, weight)) in enumerate(zip(latents, parts, strict=True)):
            last = in_place and i == len(parts) - 1
            pre = both.baddbmm_(latent, up_in) if last else torch.baddbmm(both, latent, up_in)
            act = _times(activation(pre[:rows]), pre[rows:])
            outward.append((act @ down_out.mT) * weight)
            act = _times(act, weight)
            mixed = act if mixed is None else _added(mixed, act)
        assert mixed is not None
        return mixed, outward

    def _merged(self, x: Tensor, gates: Tensor) -> Tensor:
        """One activation per token, with each row's mixture of weights: the gates weigh the stacked latent."""
        base, own = self._base[0], gates[..., 1:, None]  # [B, T or 1, S, 1]
        latent = torch.unflatten(linear(x, self.down_in.flatten(0, 2)), -1, self.down_in.shape[:3])
        latent = (latent * own.unsqueeze(-3)).flatten(-2).flatten(0, 1).transpose(0, 1)  # [2, B T, S r]
        inward = torch.stack([base.gate(x), base.up(x)]).flatten(1, 2)
        gate, up = inward.baddbmm_(latent, self.up_in.flatten(1, 2))  # a CPU does both at once in 2/3 of the time
        act = (base.activation(gate) * up).unflatten(0, x.shape[:2])
        return _plus(base.down(act), self._outward(act) * own, self.up_out)

    def _every_expert(self, x: Tensor, gates: Tensor) -> Tensor:
        """One activation per expert, weighted by the gates before the shared down projection, which is linear."""
        base = self._base[0]
        gate, up = base.gate(x), base.up(x)
        latent = torch.unflatten(linear(x, self.down_in.flatten(0, 2)), -1, self.down_in.shape[:3])
        if not torch.is_grad_enabled():
            return self._every_expert_served(torch.stack([gate, up]), latent, gates)
        b, t, f = gate.shape
        flat = gates.expand(b, t, -1).flatten(0, 1)
        mixed, outward = mixed_activations(
            gate.view(-1, f), up.view(-1, f), latent.flatten(0, 1), self.up_in, self.down_out, flat, base.activation
        )
        return _plus(base.down(mixed.view(b, t, f)), outward.view(b, t, *outward.shape[1:]), self.up_out)

    def _every_expert_served(self, inward: Tensor, latent: Tensor, gates: Tensor) -> Tensor:
        """The same without gradients: inward [2, B, T, f], latent [B, T, 2, S, r]. All tokens are one batch entry."""
        _, b, t, _ = inward.shape
        latents = latent.flatten(0, 1).permute(2, 1, 0, 3)  # [S, 2, B T, r]
        weights = gates.expand(b, t, -1).reshape(1, b * t, -1, 1).unbind(2)
        parts = [(self.up_in[:, s], self.down_out[s], weight) for s, weight in enumerate(weights[1:])]
        mixed, outward = self._mixed(inward.flatten(1, 2).unsqueeze(1), latents.unbind(0), parts, weights[0])
        y = _plus(self._base[0].down(mixed), torch.stack(outward, dim=-2), self.up_out)
        return y.view(b, t, -1)

    def _outward(self, act: Tensor) -> Tensor:
        """act [B, T, f] -> D_d,i act of every specialist i, [B, T, S, r]."""
        return torch.unflatten(linear(act, self.down_out.flatten(0, 1)), -1, self.down_out.shape[:2])


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a b, in place of a where no gradients need it: a new tensor of activations costs as much time as the product."""
    return a * b if torch.is_grad_enabled() else a.mul_(b)


def _added(a: Tensor, b: Tensor) -> Tensor:
    """a + b, in place of a likewise."""
    return a + b if torch.is_grad_enabled() else a.add_(b)


def _plus(shared: Tensor, latent: Tensor, up: Tensor) -> Tensor:
    """Add Σₛ latentₛ Uₛ to `shared` [B, T, m] in place: latent [B, T, S, r], up [S, r, m]."""
    shared.view(-1, shared.shape[-1]).addmm_(latent.flatten(-2).flatten(0, -2), up.flatten(0, 1))
    return shared


def stack(specialists: list[Factors]) -> dict[str, Tensor]:
    """The parameters of a `FusedMixture` by name (STACKS), from factors by specialist; ranks are padded with zeros."""
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
    """The inverse of `stack`: copies of the specialists' factors, with the padding that it added."""
    return [
        Factors(
            down={"gate": a.clone(), "up": b.clone(), "down": outward.clone()},
            up={"gate": g.T.clone(), "up": u.T.clone(), "down": o.T.clone()},
        )
        for a, b, outward, g, u, o in zip(
            *stacks["down_in"], stacks["down_out"], *stacks["up_in"], stacks["up_out"], strict=True
        )
    ]
