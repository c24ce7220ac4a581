"""Stage 2's step on a large GPU cluster: a model, not a measurement.

It has the form of `suite.costs`, which is tested against measurements, with assumed constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from suite.costs import Link


@dataclass(frozen=True)
class Shape:
    """The sizes that the model depends on, of a network with an AlignX layer in every decoder layer."""

    layers: int
    hidden: int
    ffn: int
    attention: int  # weights of a layer's attention
    head: int  # weights of the output head
    experts: int
    rank: int
    shared_trained: int  # router and output calibrations: reduced over all ranks

    @classmethod
    def of(cls, config: Any, experts: int, rank: int, shared_trained: int) -> Shape:
        d, heads = config.hidden_size, config.num_attention_heads
        width = getattr(config, "head_dim", None) or d // heads
        attention = 2 * d * width * (heads + config.num_key_value_heads)
        return cls(
            layers=config.num_hidden_layers,
            hidden=d,
            ffn=config.intermediate_size,
            attention=attention,
            head=config.vocab_size * d,
            experts=experts,
            rank=rank,
            shared_trained=shared_trained,
        )

    @property
    def factors(self) -> int:
        """Weights of one expert in one layer."""
        return 3 * self.rank * (self.hidden + self.ffn)

    def flops_per_token(self, length: int) -> float:
        """Forward and backward; the frozen trunk has no weight gradients, and every expert runs the whole base FFN."""
        frozen = self.attention + self.experts * 3 * self.hidden * self.ffn
        scores = length * self.hidden  # queries by keys and scores by values, half of each: it is causal
        each = 4 * frozen + 6 * (scores + self.experts * self.factors)
        return self.layers * each + 4 * self.head


@dataclass(frozen=True)
class Assumptions:
    """The assumed cluster; each value is an option of the benchmark."""

    flops: float = 350e12  # achieved by a GPU, of 989e12 (H100, bf16 dense)
    overhead_ms: float = 20.0  # of a step: launches and the optimizer, not hidden
    nvlink_latency_us: float = 15.0  # of an all-to-all within a node
    nvlink_gb_s: float = 300.0  # of each GPU and direction, of 450
    ib_latency_us: float = 10.0  # of each hop of a tree across nodes
    ib_gb_s: float = 40.0  # of each GPU and direction, of 50 (one 400 Gb/s adapter a GPU)
    gpus_per_node: int = 8
    tokens_per_gpu: int = 8192  # of a micro batch
    strong_tokens: int = 2**21  # of a global batch, where the batch stays as it is
    sequence: int = 2048
    element: int = 2  # bytes: bfloat16
    padding: float = 0.0  # share of the dispatched slots that hold no token


@dataclass(frozen=True)
class Drawn:
    """One point of the extrapolation; times in seconds."""

    gpus: int
    tokens: float  # of the global batch
    compute: float
    all_to_all: float
    all_reduce: float
    overhead: float

    @property
    def step(self) -> float:
        return self.compute + self.all_to_all + self.all_reduce + self.overhead

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


def expert_parallel(shape: Shape, gpus: int, a: Assumptions) -> int:
    """The largest ep_size that divides experts and ranks and stays within a node."""
    return max(n for n in range(1, min(gpus, a.gpus_per_node) + 1) if shape.experts % n == 0 and gpus % n == 0)


def draw(shape: Shape, gpus: int, tokens: float, a: Assumptions) -> Drawn:
    """A step on this many GPUs: expert parallel within nodes, data parallel across them, ZeRO-2 on what is trained.

    The batch is split into micro batches of `tokens_per_gpu`; ZeRO-2 reduces after each. Nothing overlaps.
    """
    own = tokens / gpus
    micro = max(1, math.ceil(own / a.tokens_per_gpu))
    slots = own / (1 - a.padding)
    ep = expert_parallel(shape, gpus, a)
    compute = shape.flops_per_token(a.sequence) * slots / a.flops
    nvlink = Link(a.nvlink_latency_us * 1e-6, 1e-9 / a.nvlink_gb_s)
    moved = 4 * shape.layers * slots * shape.experts * shape.hidden * a.element * (ep - 1) / ep
    all_to_all = nvlink.seconds(4 * shape.layers * micro, moved) if ep > 1 else 0.0
    experts = shape.layers * shape.factors * shape.experts / ep
    each = _reduce_scatter(shape.shared_trained * a.element, gpus, 1, a)
    each += _reduce_scatter(experts * a.element, gpus // ep, ep, a)
    all_gather = each  # of the updated weights: as many bytes, once
    return Drawn(gpus, tokens, compute, all_to_all, micro * each + all_gather, a.overhead_ms / 1000)


def _reduce_scatter(size: float, ranks: int, stride: int, a: Assumptions) -> float:
    """Over ranks of which every `stride`-th GPU is one.

    Latency grows with the depth of a tree; bandwidth is that of the slowest link on the way.
    """
    if ranks == 1:
        return 0.0
    across = ranks * stride > a.gpus_per_node
    hop, speed = (a.ib_latency_us, a.ib_gb_s) if across else (a.nvlink_latency_us, a.nvlink_gb_s)
    return math.ceil(math.log2(ranks)) * hop * 1e-6 + (ranks - 1) / ranks * size / (1e9 * speed)
