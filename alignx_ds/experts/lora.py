"""LoRA (arXiv 2106.09685): a specialist that trains low-rank factors beside frozen weights. They are its expert.

Shapes: a projection W [m, n] becomes W + s·B·A with A = `lora_down` [r, n], B = `lora_up` [m, r], and s = alpha / r, or
alpha / √r if rank-stabilised (rsLoRA, arXiv 2312.03732). The expert's `up` factor is s·B, so nothing is approximated.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from alignx_ds.config.schema import RunConfig
from alignx_ds.experts.task_vectors import owner
from alignx_ds.mocae.backbones import Backbone
from alignx_ds.mocae.experts import ATTENTION, PROJECTIONS, Factors
from alignx_ds.models.base import BaseModel
from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed


@dataclass(frozen=True)
class Lora:
    """The settings of a run's LoRA specialists."""

    rank: int
    scale: float  # s
    dropout: float
    projections: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig) -> Lora:
        """The rank is `experts.rank`, because the factors are the expert."""
        rank, given = config.experts.rank, config.train.lora
        scale = given.alpha / (sqrt(rank) if given.rslora else rank)
        return cls(rank, scale, given.dropout, tuple(target.removesuffix("_proj") for target in given.targets))

    def rank_of(self, projection: str) -> int:
        """Of the expert's factors, which are zeros where no LoRA is trained."""
        return self.rank if projection in self.projections else 1

    def trained_in(self, layers: list[int]) -> Iterator[tuple[int, str]]:
        """(layer, projection): of these AlignX layers, all but the lowest have those of the attention."""
        for layer in layers:
            yield from ((layer, p) for p in self.projections if p in PROJECTIONS or layer > min(layers))

    def numbers(self, base: BaseModel) -> int:
        """Of all factors."""
        linears = (base.table.linear(base.skeleton, layer, p) for layer, p in self.trained_in(base.layers))
        return sum(self.rank * (linear.in_features + linear.out_features) for linear in linears)


class LoraLinear(nn.Linear):
    """y = W x + s·B(A·dropout(x)): a linear layer in another's place, with that one's own weight and bias.

    PEFT wraps the layer instead, which renames the weight. Here every name and view of the base model stays as it is.
    """

    def __init__(self, base: nn.Linear, lora: Lora, seed: int) -> None:
        """A is drawn as PEFT draws it, from `seed` alone, and B is zero: at first nothing is changed."""
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = lora.scale, lora.dropout
        down, up = torch.empty(lora.rank, base.in_features), torch.zeros(base.out_features, lora.rank)
        nn.init.kaiming_uniform_(down, a=sqrt(5), generator=torch.Generator().manual_seed(seed))
        self.lora_down, self.lora_up = nn.Parameter(down.to(base.weight)), nn.Parameter(up.to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., m] in the dtype of x."""
        latent = linear(dropout(x, self.dropout, self.training), self.lora_down)
        return super().forward(x) + self.scale * linear(latent, self.lora_up)


def add_lora(model: nn.Module, table: Backbone, layers: list[int], lora: Lora, seed: int) -> None:
    """Freeze the model and give the chosen projections of these layers factors to train.

    Where ZeRO-3 has sharded the model, the engine shards the factors too when it starts.
    """
    model.requires_grad_(False)
    for layer, p in lora.trained_in(layers):
        own = zlib.crc32(f"{seed} {layer} {p}".encode())  # no draw depends on another
        made = LoraLinear(table.linear(model, layer, p), lora, own)
        table.owner_of(model, layer, p).set_submodule(getattr(table, p), made)


def lora_factors(model: nn.Module, base: BaseModel) -> Iterator[tuple[int, Factors | None]]:
    """(layer, the expert's factors fp32 on the CPU) of every AlignX layer; None on ranks that do not own it.

    `model` is stage 1's, within its DeepSpeed engine, whose fp32 master weights are read. A projection of the FFN
    without LoRA has zero factors of rank 1, one of the attention has none. Collective.
    """
    for position, layer in enumerate(base.layers):
        linears = {p: base.table.linear(model, layer, p) for p in (*base.table.projections, *ATTENTION)}
        changed = {p: m for p, m in linears.items() if p in PROJECTIONS or isinstance(m, LoraLinear)}
        halves = {p: _halves(module) for p, module in changed.items()}
        factors = Factors({p: down for p, (down, _) in halves.items()}, {p: up for p, (_, up) in halves.items()})
        yield layer, factors if owner(position) == distributed.rank() else None


def _halves(module: nn.Linear) -> tuple[Tensor, Tensor]:
    """(A, s·B) of a projection; zeros without LoRA."""
    if not isinstance(module, LoraLinear):
        return torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1)
    whole = load_deepspeed().utils.safe_get_full_fp32_param
    down, up = whole(module.lora_down), whole(module.lora_up)  # on every rank
    return down.float().cpu(), module.scale * up.float().cpu()
