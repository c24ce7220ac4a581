"""The expert-parallel path: DeepSpeed's MoE layer hosts the experts across ranks, with our gate in place of its own.

Shapes: B rows, T tokens, S = B·T, d hidden size, E experts, K routes per token, C capacity. The gate is called as
`deepspeed.moe.sharded_moe.MOELayer` of DeepSpeed 0.19 calls it. DeepSpeed is imported where it is used: serving an
aligned model does not need it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alignx_ds.mocae.experts import Factors, FeedForward, LowRankExpert, align_ranks

# (l_aux, C, E, expert ids [K, S], slots [K, S], gates [K, S], tokens per expert [E])
Routes = tuple[Tensor, int, int, Tensor, Tensor, Tensor, Tensor]


class Dispatch(nn.Module):
    """Takes the place of DeepSpeed's gate and turns gates that are decided already into routes; it drops only padding.

    The capacity is the load of the fullest expert over the whole expert-parallel group. So no token is dropped, and a
    token's route does not depend on other tokens.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.ep_group: object | None = None
        self.token_gates: Tensor | None = None  # [S, E] fp32, set by ParallelMixture during its call
        self.slots = 0  # E·C of the last call
        self.padding_fraction = 0.0  # the share of them that held no token

    def _set_ep_group(self, group: object) -> None:
        self.ep_group = group

    def forward(self, x: Tensor, used_token: Tensor | None, sparse_routes: bool, use_tutel: bool) -> Routes:
        """x [S, d] -> the routes of `token_gates`, none of them negative. Collective over the expert-parallel group."""
        assert sparse_routes and not use_tutel, "DeepSpeed's MoE layer changed its contract"
        assert self.token_gates is not None and self.token_gates.shape[0] == x.shape[0]
        gates = self.token_gates
        chosen = gates != 0  # [S, E]; the gates of padding are all zero
        counts = chosen.sum(0)
        capacity = counts.max().clamp_min(1)
        from deepspeed import comm as dist

        if self.ep_group is not None and dist.get_world_size(self.ep_group) > 1:
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        routes = max(1, int(chosen.sum(-1).max()))
        self.slots = int(capacity) * self.num_experts
        self.padding_fraction = 1.0 - float(counts.sum()) / self.slots
        slot_of = chosen.cumsum(0) - 1
        experts = gates.topk(routes, dim=-1).indices  # [S, K]
        values, slots = gates.gather(-1, experts), slot_of.gather(-1, experts)
        experts = experts.masked_fill(values == 0, -1)
        l_aux = gates.new_zeros(())  # the gating loss supervises per-instance gates; there is no balancing loss
        return l_aux, int(capacity), self.num_experts, experts.T.contiguous(), slots.T.contiguous(), values.T, counts


class ParallelMixture(nn.Module):
    """y = Σᵢ gᵢ · FFNᵢ(x) with the experts spread over `ep_size` ranks, E / ep_size on each, in the order of their ids.

    It computes what the fused path computes (fused.py), up to rounding. Factors have the dtype of the base's weights.
    """

    needs_host_sync = True  # the host reads how many tokens the fullest expert has (evaluation.decode)

    def __init__(self, base: FeedForward, experts: list[Factors], ep_size: int, ep_rank: int) -> None:
        """`experts` by global id, of which this rank keeps its own; `ep_size` divides their number."""
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
        """The experts on this rank; the first one's global id is `first_local`."""
        return list(self.moe.deepspeed_moe.experts.deepspeed_experts)

    def factors(self) -> list[Factors]:
        """Copies of all experts' factors by global id. Collective over the expert-parallel group."""
        from deepspeed.utils import groups

        local = [expert.factors() for expert in self.local_experts()]
        if self.moe.ep_size == 1:
            return local
        gathered: list[list[Factors]] = [[] for _ in range(self.moe.ep_size)]
        group = groups._get_expert_parallel_group(self.moe.expert_group_name)
        torch.distributed.all_gather_object(gathered, local, group=group)
        return [factors for part in gathered for factors in part]

    def forward(self, x: Tensor, gates: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """x [B, T, d], gates [B, T or 1, E], token_mask [B, T] -> [B, T, d] in the dtype of x. Collective.

        Where the mask is 0 (padding) a token is not dispatched and y is 0.
        """
        token_gates = gates.float().expand(*x.shape[:2], -1)
        if token_mask is not None:
            token_gates = token_gates * token_mask.unsqueeze(-1)
        self.dispatch.token_gates = token_gates.flatten(0, 1)
        try:
            y: Tensor = self.moe(x)[0]
        finally:  # activation checkpointing leaves a recomputation by an exception, as soon as it has what it needs
            self.dispatch.token_gates = None
        return y
