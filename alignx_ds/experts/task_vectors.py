"""Task vectors τ = θ − θ₀ (stage 1 of arXiv 2602.07381), streamed layer by layer between ZeRO-3's shards and disk.

The ranks share the layers, so that no process holds the whole model. A projection's weight is [m, n].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alignx_ds.experts.beside import add_beside
from alignx_ds.mocae.backbones import Backbone
from alignx_ds.mocae.experts import ATTENTION, PROJECTIONS, Factors
from alignx_ds.models.base import BaseModel
from alignx_ds.models.sharding import add
from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed

Changes = dict[str, Tensor]  # by projection of the FFN, and of the attention where it is changed: [m, n] fp32


def owner(position: int) -> int:
    """The rank that works on the AlignX layer at this position in the list of AlignX layers."""
    return position % distributed.world_size()


def layer_file(directory: Path, layer: int) -> Path:
    """The file of a specialist's directory that holds a decoder layer's task vector and factors."""
    return directory / f"layer_{layer:03d}.safetensors"


def projections(
    model: nn.Module, table: Backbone, layer: int, names: Iterable[str] = PROJECTIONS
) -> dict[str, nn.Parameter]:
    """The weights of a decoder layer by projection; empty tensors where ZeRO-3 has sharded them."""
    weights = {p: table.linear(model, layer, p).weight for p in names}
    return {p: w for p, w in weights.items() if isinstance(w, nn.Parameter)}


def task_vectors(model: nn.Module, base: BaseModel) -> Iterator[tuple[int, Changes]]:
    """(layer, changes fp32 on the CPU) of every AlignX layer; no changes on ranks that do not own it. Collective.

    `model` is stage 1's, within its DeepSpeed engine. The fp32 master weights are compared with the base's weights as
    training started from them, which is in the run's dtype.
    """
    for position, layer in enumerate(base.layers):
        changes: Changes = {}
        for name, parameter in projections(model, base.table, layer).items():
            trained = load_deepspeed().utils.safe_get_full_fp32_param(parameter)  # whole, on every rank
            assert trained is not None, "stage 1 trains every FFN weight of the AlignX layers"
            if owner(position) == distributed.rank():
                changes[name] = trained.float().cpu() - base.weight(layer, name)
            del trained
        yield layer, changes


def read_task_vector(directory: Path, layer: int) -> Changes:
    """A layer's changes from a specialist's directory. Raises OSError or SafetensorError for an unreadable file."""
    return _by_projection(load_file(layer_file(directory, layer)), "task_vector.{}")


def read_factors(directory: Path, layer: int) -> Factors:
    """A layer's factors from a specialist's directory, fp32. Raises as `read_task_vector`."""
    tensors = load_file(layer_file(directory, layer))
    return Factors(*(_by_projection(tensors, f"factors.{{}}.{half}") for half in ("down", "up")))


def _by_projection(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those whose name is `name` with a projection in it. Raises KeyError where some of the FFN's are missing."""
    changed = [p for p in (*PROJECTIONS, *ATTENTION) if name.format(p) in tensors]
    of_ffn = PROJECTIONS if set(changed) & set(PROJECTIONS) else ()
    return {p: tensors[name.format(p)] for p in dict.fromkeys((*of_ffn, *changed))}


@torch.no_grad()
def add_task_vector(model: nn.Module, base: BaseModel, directory: Path) -> None:
    """Make a base model what a specialist's directory holds, in place and in the dtype of its weights.

    Its task vector is added and, of a fine-tune of all weights, what that has changed beside it. Collective if ZeRO-3
    has sharded the model.
    """
    for layer in base.layers:
        changes = read_task_vector(directory, layer)
        weights = projections(model, base.table, layer, changes)
        with load_deepspeed().zero.GatheredParameters(list(weights.values()), modifier_rank=0):
            sharded = any(hasattr(w, "ds_id") for w in weights.values())
            if not sharded or distributed.is_main():
                for name, change in changes.items():
                    add(weights[name], change)
    add_beside(model, base, directory)
