"""Model merging: the specialists' task vectors are merged into one change of the base model, without training.

Task arithmetic (arXiv 2212.04089), TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099), layer by layer.
Shapes: a task vector of one projection is [m, n] fp32; one per axis.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignx_ds.config.schema import BaselinesConfig
from alignx_ds.experts.task_vectors import projections, read_task_vector
from alignx_ds.models.base import BaseModel
from alignx_ds.models.sharding import add

Merge = Callable[[list[Tensor], str], Tensor]  # takes the axes' vectors of one weight, and the weight's name


def task_arithmetic(vectors: list[Tensor], scale: float) -> Tensor:
    """scale · Σᵢ τᵢ (arXiv 2212.04089): vectors [m, n] -> [m, n]."""
    return scale * torch.stack(vectors).sum(0)


def ties(vectors: list[Tensor], scale: float, density: float) -> Tensor:
    """TIES (arXiv 2306.01708): vectors [m, n] -> [m, n]. `density` is the share of entries that trimming keeps.

    Each vector is trimmed to its largest entries, each entry's sign is elected by mass, and the entries that agree with
    it are averaged and scaled. Trimming goes tensor by tensor, so that one layer at a time is in memory; the paper
    ranks all entries of a vector at once.
    """
    trimmed = torch.stack([_largest(v, density) for v in vectors])
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    kept = trimmed * agrees
    return scale * kept.sum(0) / (kept != 0).sum(0).clamp(min=1)


def _largest(vector: Tensor, density: float) -> Tensor:
    """The vector with all but this share of its entries, those of largest magnitude, set to zero."""
    flat = vector.flatten()
    kept = flat.abs().topk(max(1, round(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(vector)


def dare(vectors: list[Tensor], scale: float, density: float, seeds: list[int]) -> Tensor:
    """DARE (arXiv 2311.03099): vectors [m, n] -> [m, n].

    Every entry is dropped with probability 1 − density, the rest are rescaled by 1/density, and the vectors are added
    up by task arithmetic. One seed per vector.
    """
    sparse = []
    for vector, seed in zip(vectors, seeds, strict=True):
        drawn = torch.rand(vector.shape, generator=torch.Generator().manual_seed(seed))
        sparse.append(vector * (drawn < density) / density)
    return task_arithmetic(sparse, scale)


def merge_of(name: str, c: BaselinesConfig, axes: list[str], seed: int) -> tuple[Merge, dict[str, Any]]:
    """(the merge of this name, the settings that its result depends on); `axes` in the order of the vectors."""

    def dropped(vectors: list[Tensor], weight: str) -> Tensor:
        seeds = [zlib.crc32(f"{seed} {axis} {weight}".encode()) for axis in axes]  # no draw depends on another
        return dare(vectors, c.dare_scale, c.dare_density, seeds)

    merges: dict[str, tuple[Merge, dict[str, Any]]] = {
        "task_arithmetic": (lambda v, _: task_arithmetic(v, c.arithmetic_scale), {"scale": c.arithmetic_scale}),
        "ties": (
            lambda v, _: ties(v, c.ties_scale, c.ties_density),
            {"scale": c.ties_scale, "density": c.ties_density},
        ),
        "dare": (dropped, {"scale": c.dare_scale, "density": c.dare_density, "seed": seed}),
    }
    return merges[name]


@torch.no_grad()
def add_merged(model: nn.Module, base: BaseModel, directories: list[Path], merge: Merge) -> None:
    """θ₀ + the merged change, in place, on the AlignX layers; one directory of task vectors per axis."""
    for layer in base.layers:
        vectors = [read_task_vector(directory, layer) for directory in directories]
        changed = list(dict.fromkeys(p for vector in vectors for p in vector))
        for p, weight in projections(model, base.table, layer, changed).items():
            none = torch.zeros(weight.shape)  # of an axis that has no change of this projection
            add(weight, merge([v.get(p, none) for v in vectors], base.table.weight_name(layer, p)))
