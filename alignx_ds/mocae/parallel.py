"""The expert-parallel path: DeepSpeed's MoE layer hosts the experts across ranks, behind our gate.

Shapes: S tokens (rows × length), d hidden, E experts, K routes per token, C capacity. The gate's calling contract
is that of `deepspeed.moe.sharded_moe.MOELayer` in DeepSpeed 0.19, which is imported where it is used: whoever
only serves an aligned model never waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alignx_ds.mocae.experts import Factors, FeedForward, LowRankExpert, align_ranks

# (l_aux, capacity, num_experts, expert ids [K, S], slots [K, S], gates [K, S], tokens per expert [E])
Routes = tuple[Tensor, int, int, Tensor, Tensor, Tensor, Tensor]


class Dispatch(nn.Module):
    """DeepSpeed's gate slot, filled with a decision already made: turns gates into routes, drops nothing but padding.

    Capacity is the fullest expert's load, agreed over the expert-parallel group, so no token is ever dropped and a
    token's route never depends on its neighbours.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.ep_group: object | None = None
        self.token_gates: Tensor | None = None  # [S, E] fp32, set by ParallelMixture for the call under way
        self.slots = 0  # that the last call dispatched,
        self.padding_fraction = 0.0  # and the share of them that held no token

    def _set_ep_group(self, group: object) -> None:
        self.ep_group = group

    def forward(self, x: Tensor, used_token: Tensor | None, sparse_routes: bool, use_tutel: bool) -> Routes:
        assert sparse_routes and not use_tutel, "DeepSpeed's MoE layer changed its contract"
        assert self.token_gates is not None and self.token_gates.shape[0] == x.shape[0]
        gates = self.token_gates
        chosen = gates > 0  # [S, E]; a pad's gates are all zero
        counts = chosen.sum(0)
        capacity = counts.max().clamp_min(1)
        from deepspeed import comm as dist

        if self.ep_group is not None and dist.get_world_size(self.ep_group) > 1:
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        routes = max(1, int(chosen.sum(-1).max()))
        self.slots = int(capacity) * self.num_experts
        self.padding_fraction = 1.0 - float(counts.sum()) / self.slots
        slot_of = chosen.cumsum(0) - 1
        values, experts = gates.topk(routes, dim=-1)  # [S, K]
        slots = slot_of.gather(-1, experts)
        experts = experts.masked_fill(values <= 0, -1)
        l_aux = gates.new_zeros(())  # per-instance gates are supervised by the gating loss, not balanced
        return l_aux, int(capacity), self.num_experts, experts.T.contiguous(), slots.T.contiguous(), values.T, counts


class ParallelMixture(nn.Module):
    """Experts spread over `ep_size` ranks; rank r of a group hosts global experts r·n … r·n + n − 1."""

    asks_device = True  # how many tokens the fullest expert has (evaluation.decode)

    def __init__(self, base: FeedForward, experts: list[Factors], ep_size: int, ep_rank: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        assert len(experts) % ep_size == 0
        experts = align_ranks(experts)
        hidden = base.gate.in_features
        self.moe = MoE(hidden, LowRankExpert(experts[0], base.dtype), len(experts), ep_size, drop_tokens=False)
        self.dispatch = Dispatch(len(experts))
        self.moe.deepspeed_moe.gate = self.dispatch
        self.first_local = ep_rank * self.moe.num_local_experts
        for offset, expert in enumerate(self.local_experts()):
            expert.attach(base)
            expert.load(experts[self.first_local + offset])

    def local_experts(self) -> list[LowRankExpert]:
        return list(self.moe.deepspeed_moe.experts.deepspeed_experts)

    def factors(self) -> list[Factors]:
        """All experts' factors by global expert id; a collective over the expert-parallel group."""
        from deepspeed.utils import groups

        local = [expert.factors() for expert in self.local_experts()]
        if self.moe.ep_size == 1:
            return local
        gathered: list[list[Factors]] = [[] for _ in range(self.moe.ep_size)]
        group = groups._get_expert_parallel_group(self.moe.expert_group_name)
        torch.distributed.all_gather_object(gathered, local, group=group)
        return [factors for part in gathered for factors in part]

    def forward(self, x: Tensor, gates: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """x [B, T, d], gates [B, T or 1, E], token_mask [B, T] (0 for pads, which are not dispatched) -> [B, T, d]."""
        token_gates = gates.float().expand(*x.shape[:2], -1)
        if token_mask is not None:
            token_gates = token_gates * token_mask.unsqueeze(-1)
        self.dispatch.token_gates = token_gates.flatten(0, 1)
        y: Tensor = self.moe(x)[0]
        self.dispatch.token_gates = None
        return y
