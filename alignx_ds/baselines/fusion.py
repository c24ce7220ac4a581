"""The token-level mixture of full FFN copies, as H3Fusion (arXiv 2411.17792) and TrinityX (arXiv 2509.08486) use it.

Shapes: B rows, T tokens, N = B·T, d hidden, f FFN, E experts, k experts per token, S = N·k assignments.

Published: one whole FFN per axis and no generalist, a linear gate per token and layer, H3Fusion's top-2 block with the
loop of Mixtral, TrinityX's softmax with a temperature and a scalar γ per expert. Ours, where the papers are silent: the
gate in fp32 and its initialisation, γ = 1 at first, no norm after TrinityX's mixture (it would change the pretrained
model before anything is learned), and the second, faster execution of the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from alignx_ds.mocae.backbones import Backbone
from alignx_ds.mocae.experts import PROJECTIONS, FeedForward
from alignx_ds.mocae.recomputation import is_recomputing

ALL = 0  # as top_k: every token goes to every expert
GATE_STD = 0.02  # of the gate's first weights, as of any linear layer of the backbones
GROUPED_MM: Any = getattr(functional, "grouped_mm", None)  # since torch 2.10
FEW_TOKENS = 64  # up to here a CPU is faster with all experts in one GEMM; with more, activations exceed its cache
ALIGNMENT = 16  # bytes: what the grouped GEMM requires of every row of its operands

Block = TypeVar("Block", bound=nn.Module)


@dataclass(frozen=True)
class FusionSettings:
    """In what the two fusions differ."""

    top_k: int  # experts of each token
    temperature: float  # of the gate's softmax
    scaled: bool  # whether each expert has a learned γ


H3FUSION = FusionSettings(top_k=2, temperature=1.0, scaled=False)
TRINITYX = FusionSettings(top_k=ALL, temperature=0.7, scaled=True)  # the temperature is that of the authors' code


class FullExperts(nn.Module):
    """y = Σᵢ wᵢ γᵢ FFNᵢ(x), w the softmax of a token's gate logits, over its k best experts.

    Every expert is a copy of its FFN, stacked with the others: [E, m, n] by projection, in the backbone's dtype. The
    gate computes in fp32. `logits` [N, E] fp32 are those of the last forward pass in training. When `forced` is set,
    every token goes to that expert alone. `grouped` chooses the faster of two executions of the same function.
    """

    def __init__(self, experts: list[FeedForward], settings: FusionSettings, grouped: bool = True) -> None:
        super().__init__()
        self.settings, self.grouped = settings, grouped
        self.num_experts = len(experts)
        self.top_k = min(settings.top_k, self.num_experts) or self.num_experts
        self.activation = experts[0].activation
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for p in PROJECTIONS:
            layers = [e.projection(p) for e in experts]
            self.weights[p] = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
            if layers[0].bias is not None:
                self.biases[p] = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))
        stacked = self.weights["gate"]
        self.gate = nn.Linear(stacked.shape[-1], self.num_experts, bias=False, device=stacked.device)
        nn.init.normal_(self.gate.weight, std=GATE_STD)
        ones = torch.ones(self.num_experts, device=stacked.device)
        self.gamma = nn.Parameter(ones) if settings.scaled else None
        self.forced: int | None = None
        self.logits: Tensor | None = None

    @property
    def needs_host_sync(self) -> bool:
        """Whether the host reads how many tokens each expert has in a forward pass (evaluation.decode)."""
        if self.top_k == self.num_experts:
            return self.forced is not None
        return self.forced is not None or not (self.grouped and _has_grouped_gemm(self.weights["gate"]))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        tokens = x.flatten(0, -2)
        weights, chosen = self._route(tokens)
        at_once = self.grouped and (x.is_cuda or len(tokens) <= FEW_TOKENS)
        if chosen is None:
            mixed = self._dense_at_once(tokens, weights) if at_once else self._dense_by_expert(tokens, weights)
        elif self.grouped:
            mixed = self._sorted(tokens, weights, chosen, at_once)
        else:
            mixed = self._looped(tokens, weights, chosen)
        return mixed.view_as(x)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(weights, experts), each [N, k]; when every token goes to every expert, (weights [N, E], None)."""
        logits = linear(x.float(), self.gate.weight.float())
        if not is_recomputing():
            self.logits = logits if self.training else None
        weights, chosen = (logits / self.settings.temperature).softmax(-1), None
        if self.forced is not None:
            weights = torch.zeros_like(weights).index_fill(1, torch.tensor([self.forced], device=x.device), 1.0)
        if self.top_k < self.num_experts:
            weights, chosen = weights.topk(self.top_k, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
        if self.gamma is not None:
            weights = weights * (self.gamma if chosen is None else self.gamma[chosen])
        return weights.to(x.dtype), chosen

    def _experts(self) -> list[Callable[[Tensor], Tensor]]:
        """Every expert's FFN, [n, d] -> [n, d]."""
        weights = {p: w.unbind() for p, w in self.weights.items()}
        biases = {p: b.unbind() for p, b in self.biases.items()}

        def expert(number: int) -> Callable[[Tensor], Tensor]:
            def project(p: str, x: Tensor) -> Tensor:
                return linear(x, weights[p][number], biases[p][number] if p in biases else None)

            return lambda x: project("down", self.activation(project("gate", x)) * project("up", x))

        return [expert(number) for number in range(self.num_experts)]

    def _looped(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """H3Fusion's block: for each expert, its tokens are found by a mask, and its outputs are added in place."""
        mixed = torch.zeros_like(x)
        mask = functional.one_hot(chosen, self.num_experts).permute(2, 1, 0)  # [E, k, N]
        for number, expert in enumerate(self._experts()):
            place, token = torch.where(mask[number])
            mixed.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return mixed

    def _dense_by_expert(self, x: Tensor, weights: Tensor) -> Tensor:
        parts = [expert(x) * w.unsqueeze(-1) for expert, w in zip(self._experts(), weights.unbind(-1), strict=True)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _sorted(self, x: Tensor, weights: Tensor, chosen: Tensor, at_once: bool) -> Tensor:
        """Sort tokens by expert, apply each expert to its own, and put the outputs back in the tokens' order."""
        experts, order = chosen.flatten().sort(stable=True)  # [S]
        every = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(experts, every, right=True, out_int32=True)  # [E]: where each expert's tokens end
        arranged = x.index_select(0, order // self.top_k)
        if at_once and _has_grouped_gemm(self.weights["gate"]):
            gate, up = (self._grouped(p, arranged, experts, ends) for p in ("gate", "up"))
            answers = self._grouped("down", self.activation(gate) * up, experts, ends)
        else:
            counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
            parts = torch.split(arranged, counts)
            answers = torch.cat([expert(part) for expert, part in zip(self._experts(), parts, strict=True)])
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        if x.is_cuda and torch.is_grad_enabled():
            return weighted_sum(answers, back, weights)
        back = back.view_as(chosen)
        return functional.embedding_bag(back, answers, per_sample_weights=weights, mode="sum")  # Σₖ wₖ answers[backₖ]

    def _grouped(self, name: str, x: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        """The projection [S, n] -> [S, m] of rows that are sorted by expert, as one grouped GEMM."""
        projected: Tensor = GROUPED_MM(x, self.weights[name].mT, offs=ends)
        return projected + self.biases[name][experts] if name in self.biases else projected

    def _dense_at_once(self, x: Tensor, weights: Tensor) -> Tensor:
        """The experts side by side form one wide FFN; the weights scale its activations."""
        activated = self.activation(self._wide("gate", x)) * self._wide("up", x)  # [N, E f]
        activated = activated.unflatten(-1, (self.num_experts, -1)) * weights.unsqueeze(-1)
        mixed = weights @ self.biases["down"] if "down" in self.biases else torch.zeros_like(x)
        for number, weight in enumerate(self.weights["down"].unbind()):
            mixed = torch.addmm(mixed, activated[:, number], weight.mT)
        return mixed

    def _wide(self, name: str, x: Tensor) -> Tensor:
        bias = self.biases[name].flatten() if name in self.biases else None
        return linear(x, self.weights[name].flatten(0, 1), bias)


def weighted_sum(answers: Tensor, back: Tensor, weights: Tensor) -> Tensor:
    """Σₖ wₖ answers[backₖ], answers [S, d], back [S] a permutation, weights [N, k] -> [N, d].

    What embedding_bag computes in one kernel, which lacks a gradient of the weights in bf16 on CUDA (torch 2.11). It
    rounds otherwise, so training on the CPU, as in the published runs, keeps to embedding_bag.
    """
    parts = answers.index_select(0, back).view(*weights.shape, -1)
    return (parts * weights.unsqueeze(-1)).sum(1)


def _has_grouped_gemm(weight: Tensor) -> bool:
    """Whether torch has a grouped GEMM for these weights [E, m, n] here: not for fp32 on a GPU, for example."""
    kinds = (torch.bfloat16,) if weight.is_cuda else (torch.bfloat16, torch.float32)
    aligned = all(size * weight.element_size() % ALIGNMENT == 0 for size in weight.shape[1:])
    return GROUPED_MM is not None and weight.dtype in kinds and aligned


def replace_ffns(
    model: nn.Module, table: Backbone, layers: list[int], make: Callable[[int, FeedForward], Block]
) -> dict[int, Block]:
    """Replace these layers' FFNs by `make(layer, its FFN)`, in place; returns the new blocks by layer."""
    made = {}
    for layer in layers:
        made[layer] = make(layer, table.view(table.ffn_of(model, layer)))
        setattr(table.decoder_layers(model)[layer], table.ffn, made[layer])
    return made


def fusion_layers(model: nn.Module) -> list[FullExperts]:
    """The model's mixtures, from the lowest layer to the highest."""
    return [m for m in model.modules() if isinstance(m, FullExperts)]
