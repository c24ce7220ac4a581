"""Task vectors τ = θ − θ₀, streamed layer by layer between ZeRO-3's shards and disk.

Layer ℓ is the work of rank ℓ mod W; no process ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alignx_ds.mocae.backbones import Backbone
from alignx_ds.mocae.experts import PROJECTIONS, Factors
from alignx_ds.models.base import BaseModel
from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed

Changes = dict[str, Tensor]  # by projection, [m, n] fp32


def owner(position: int) -> int:
    """The rank that works on the AlignX layer at this position."""
    return position % distributed.world_size()


def layer_file(directory: Path, layer: int) -> Path:
    return directory / f"layer_{layer:03d}.safetensors"


def projections(model: nn.Module, table: Backbone, layer: int) -> dict[str, nn.Parameter]:
    ffn = table.view(table.ffn_of(model, layer))
    weights = {p: ffn.projection(p).weight for p in PROJECTIONS}
    return {p: w for p, w in weights.items() if isinstance(w, nn.Parameter)}


def task_vectors(model: nn.Module, base: BaseModel) -> Iterator[tuple[int, Changes]]:
    """(layer, changes) of every AlignX layer; the changes are empty on ranks that do not own the layer. Collective."""
    for position, layer in enumerate(base.layers):
        changes: Changes = {}
        for name, parameter in projections(model, base.table, layer).items():
            trained = load_deepspeed().utils.safe_get_full_fp32_param(
                parameter
            )  # the fp32 master, whole, on every rank
            assert trained is not None, "stage 1 trains every FFN weight of the AlignX layers"
            if owner(position) == distributed.rank():
                changes[name] = trained.float().cpu() - base.weight(layer, name)
            del trained
        yield layer, changes


def read_task_vector(directory: Path, layer: int) -> Changes:
    tensors = load_file(layer_file(directory, layer))
    return {p: tensors[f"task_vector.{p}"] for p in PROJECTIONS}


def read_factors(directory: Path, layer: int) -> Factors:
    tensors = load_file(layer_file(directory, layer))
    return Factors(
        down={p: tensors[f"factors.{p}.down"] for p in PROJECTIONS},
        up={p: tensors[f"factors.{p}.up"] for p in PROJECTIONS},
    )


@torch.no_grad()
def add_task_vector(model: nn.Module, base: BaseModel, directory: Path) -> None:
    """θ₀ + τ in place, whether or not ZeRO-3 has sharded the model. Collective under ZeRO-3."""
    for layer in base.layers:
        weights = projections(model, base.table, layer)
        with load_deepspeed().zero.GatheredParameters(list(weights.values()), modifier_rank=0):
            sharded = any(hasattr(w, "ds_id") for w in weights.values())
            if not sharded or distributed.is_main():
                for name, change in read_task_vector(directory, layer).items():
                    weights[name].add_(change.to(weights[name]))
