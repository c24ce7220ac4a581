"""Steps of both stages on a large GPU cluster: a model, not a measurement.

It has the form of `suite.costs`, which is tested against measurements, with assumed constants. Which micro batch fits a
GPU is asked of the dry run's estimate of memory.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

from alignx_ds.config.schema import RunConfig
from alignx_ds.models.base import BaseModel
from alignx_ds.plan.gpu_memory import FREE
from alignx_ds.plan.memory import stage_memory
from alignx_ds.plan.sizes import counts
from alignx_ds.training import flops
from suite.costs import Link

GIB = 2**30


@dataclass(frozen=True)
class Assumptions:
    """The assumed cluster; each value is an option of the benchmark."""

    flops: float = 350e12  # achieved by a GPU, of 989e12 (H100, bf16 dense)
    overhead_ms: float = 20.0  # of a step: launches and the optimizer, not hidden
    nvlink_latency_us: float = 15.0  # of a call within a node
    nvlink_gb_s: float = 300.0  # of each GPU and direction, of 450
    ib_latency_us: float = 10.0  # of each hop of a tree across nodes
    ib_gb_s: float = 40.0  # of each GPU and direction, of 50 (one 400 Gb/s adapter a GPU)
    gpus_per_node: int = 8
    gpu_gib: float = 80.0
    rows_per_gpu: int = 8  # of a step, in micro batches that fit
    sequence: int = 2048
    element: int = 2  # bytes: bfloat16
    padding: float = 0.0  # share of the dispatched slots that hold no token


@dataclass(frozen=True)
class Way:
    """How a stage is spread over the ranks."""

    name: str
    stage: str  # the key of its settings
    zero: int
    expert_parallel: bool = False

    def settings(self, c: RunConfig, gpus: int, accumulation: int, a: Assumptions, *, recomputed: bool) -> RunConfig:
        """The recipe with this way, on so many GPUs."""
        made = copy.deepcopy(c)
        made.model.max_length = a.sequence
        stage = made.train if self.stage == "train" else made.align
        stage.deepspeed = f"ds_configs/zero{self.zero}_gpu.json"
        stage.batch, stage.accumulation = gpus * a.rows_per_gpu, accumulation
        stage.checkpoint_activations = str(recomputed).lower()
        made.align.ep_size = expert_parallel(len(c.expert_names), gpus, a) if self.expert_parallel else 0
        return made


WAYS = (
    Way("stage 1, ZeRO-2", "train", 2),
    Way("stage 1, ZeRO-3", "train", 3),
    Way("stage 2, expert parallel, ZeRO-2", "align", 2, expert_parallel=True),
    Way("stage 2, fused, ZeRO-2", "align", 2),
    Way("stage 2, fused, ZeRO-3", "align", 3),
)


@dataclass(frozen=True)
class Drawn:
    """One point of the extrapolation; times in seconds, of a step."""

    way: str
    gpus: int
    tokens: float  # of the global batch
    micro_rows: int  # of a GPU's micro batch
    recomputed: bool  # activations
    peak_gib: float  # of a GPU
    compute: float
    all_to_all: float
    gathered: float  # weights by ZeRO-3
    reduced: float  # gradients, and under ZeRO-2 the weights that are updated
    overhead: float

    @property
    def step(self) -> float:
        return self.compute + self.all_to_all + self.gathered + self.reduced + self.overhead

    @property
    def tokens_per_second_and_gpu(self) -> float:
        return self.tokens / self.step / self.gpus


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights that a way's communication depends on."""

    weights: int  # of the whole model: what ZeRO-3 gathers in the forward pass
    above: int  # of the trained layers and the head: in the backward pass
    layers: int
    trained_layers: int
    hidden: int
    trained: int  # on every rank: reduced over all
    of_experts: int  # trained and spread over ranks by expert parallelism, of all experts

    @classmethod
    def of(cls, c: RunConfig, base: BaseModel, way: Way) -> Sizes:
        w, chosen, counted = flops.Weights.of(base.config), len(base.layers), counts(c, base)
        first, factors = way.stage == "train", counted["experts' factors"]
        spread = factors if way.expert_parallel else 0
        everywhere = counted["gates and calibrations"] + factors - spread
        return cls(
            weights=counted["base model"],
            above=chosen * (w.attention + w.ffn) + w.head,
            layers=w.layers,
            trained_layers=chosen,
            hidden=base.config.hidden_size,
            trained=counted["trained in stage 1"] if first else everywhere,
            of_experts=spread,
        )


def draw(c: RunConfig, base: BaseModel, way: Way, gpus: int, a: Assumptions) -> Drawn | None:
    """A step in the micro batches that are fastest of all that fit, with activations kept or recomputed; None where not
    even a row fits."""
    made = []
    micro = [n for n in range(1, a.rows_per_gpu + 1) if a.rows_per_gpu % n == 0]
    for parts, recomputed in itertools.product(micro, (False, True)):
        settings = way.settings(c, gpus, parts, a, recomputed=recomputed)
        peak = stage_memory(settings, base, way.stage, (), gpus, on_gpu=True).peak
        if peak <= a.gpu_gib * GIB * (1 - FREE):
            made.append(cost(settings, base, way, gpus, parts, a, peak=peak, recomputed=recomputed))
    return min(made, key=lambda drawn: drawn.step, default=None)


def cost(
    c: RunConfig, base: BaseModel, way: Way, gpus: int, micro: int, a: Assumptions, *, peak: float, recomputed: bool
) -> Drawn:
    """Of a step in `micro` micro batches, in which nothing overlaps. ZeRO-2 and 3 reduce after each of them.

    ZeRO-3 also gathers the weights twice, in the backward pass down to the lowest layer that is trained.
    """
    s, ep = Sizes.of(c, base, way), c.align.ep_size if way.expert_parallel else 1
    own = a.rows_per_gpu * a.sequence
    slots = own / (1 - a.padding) if way.expert_parallel else own
    forward_and_backward = flops_per_token(c, base, way, a)
    compute = slots * (forward_and_backward + (forward_flops(base, a) if recomputed else 0)) / a.flops
    moved = 4 * s.trained_layers * slots * len(c.expert_names) * s.hidden * a.element * (ep - 1) / ep
    nvlink = Link(a.nvlink_latency_us * 1e-6, 1e-9 / a.nvlink_gb_s)
    gathers = _spread(s.weights * a.element, gpus, 1, s.layers, a)
    gathers += _spread(s.above * a.element, gpus, 1, s.trained_layers, a)
    reduction = _spread(s.trained * a.element, gpus, 1, 1, a) + _spread(
        s.of_experts / ep * a.element, gpus // ep, ep, 1, a
    )
    updated = 0 if way.zero == 3 else reduction  # as many bytes again, gathered once
    return Drawn(
        way=way.name,
        gpus=gpus,
        tokens=float(gpus * own),
        micro_rows=a.rows_per_gpu // micro,
        recomputed=recomputed,
        peak_gib=peak / GIB,
        compute=compute,
        all_to_all=nvlink.seconds(4 * s.trained_layers * micro, moved) if ep > 1 else 0.0,
        gathered=micro * gathers if way.zero == 3 else 0.0,
        reduced=micro * reduction + updated,
        overhead=a.overhead_ms / 1000,
    )


def flops_per_token(c: RunConfig, base: BaseModel, way: Way, a: Assumptions) -> float:
    """Forward and backward, attention scores included."""
    if way.stage == "train":
        gemms = flops.fine_tune(base.config, base.layers)
    else:
        fused = not way.expert_parallel
        gemms = flops.mixture(base.config, base.layers, len(c.expert_names), c.experts.rank, fused=fused)
    return gemms + _scores(base, a) * (base.config.num_hidden_layers + 2 * len(base.layers))


def forward_flops(base: BaseModel, a: Assumptions) -> float:
    """Of the base model's layers; what the experts add is left out."""
    w = flops.Weights.of(base.config)
    return 2.0 * w.layers * (w.attention + w.ffn) + _scores(base, a) * w.layers


def _scores(base: BaseModel, a: Assumptions) -> float:
    """Of a token in a layer, forward: queries by keys and scores by values, half of each, as it is causal."""
    return 2.0 * a.sequence * float(base.config.hidden_size)


def expert_parallel(experts: int, gpus: int, a: Assumptions) -> int:
    """The largest ep_size that divides experts and ranks and stays within a node."""
    return max(n for n in range(1, min(gpus, a.gpus_per_node) + 1) if experts % n == 0 and gpus % n == 0)


def _spread(size: float, ranks: int, stride: int, calls: int, a: Assumptions) -> float:
    """Seconds to reduce-scatter, or to gather, `size` bytes in so many calls, over ranks of which every `stride`-th GPU
    is one.

    Latency grows with the depth of a tree; bandwidth is that of the slowest link on the way.
    """
    if ranks == 1 or not size:
        return 0.0
    across = ranks * stride > a.gpus_per_node
    hop, speed = (a.ib_latency_us, a.ib_gb_s) if across else (a.nvlink_latency_us, a.nvlink_gb_s)
    return calls * math.ceil(math.log2(ranks)) * hop * 1e-6 + (ranks - 1) / ranks * size / (1e9 * speed)
