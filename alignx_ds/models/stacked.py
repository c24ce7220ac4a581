"""Weights of a mixture of experts that a checkpoint holds expert by expert, and the modules hold in one stack.

Shapes: E experts; a stack [E, m, n] has each expert's weight [m, n], which is stored as one tensor or as several, whose
rows follow each other (gate and up projection). transformers converts them when it loads a whole model
(`transformers.conversion_mapping`); here they are read without it, one by one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from alignx_ds.models.stored import Stored

Parts = dict[str, list[Stored]]  # by the pattern that their names have in common


@dataclass(frozen=True)
class Stacked(Stored):
    """A stack, by the headers of the tensors that it is made of. `name`, `file` and `dtype` are the first one's."""

    experts: tuple[tuple[Stored, ...], ...] = field(default=())

    def parts(self) -> list[Stored]:
        return [part for parts in self.experts for part in parts]

    def read(self) -> Tensor:
        return self.read_rows(0, len(self.experts))

    def read_rows(self, first: int, last: int) -> Tensor:
        """Some experts' weights [last - first, m, n]; those of the others are not read."""
        weights = [torch.cat([part.read() for part in parts]) for parts in self.experts[first:last]]
        return torch.stack(weights) if weights else torch.empty(0, *self.shape[1:])


def is_stack(converter: WeightConverter) -> bool:
    """Whether it makes a stack and no more: its experts' tensors may be concatenated along their rows."""
    first, *others = converter.operations
    merges = isinstance(first, MergeModulelist) and first.dim == 0
    return merges and all(isinstance(other, Concatenate) and other.dim == 1 for other in others)


def stacked(converter: WeightConverter, parts: Parts, wanted: Sequence[int]) -> Stacked | None:
    """The stack that a converter makes of its tensors; None where an expert's are not there.

    Its shape is `wanted` [E, m, n] where every expert's is, else the first one that differs.
    """
    columns = [sorted(parts.get(pattern, ()), key=_natural) for pattern in converter.source_patterns]
    if any(len(column) != wanted[0] for column in columns):
        return None
    experts = tuple(zip(*columns, strict=True))
    shapes = [_shape(of_expert) for of_expert in experts]
    odd = next((shape for shape in shapes if shape != tuple(wanted[1:])), shapes[0])
    first = experts[0][0]
    return Stacked(first.file, first.name, (wanted[0], *odd), first.dtype, experts)


def _shape(of_expert: Sequence[Stored]) -> tuple[int, ...]:
    first = of_expert[0].shape
    if any(len(part.shape) != 2 or part.shape[1:] != first[1:] for part in of_expert):
        return ()
    return (sum(part.shape[0] for part in of_expert), *first[1:])


def _natural(tensor: Stored) -> list[int]:
    """Expert 10 comes after expert 9."""
    return [int(number) for number in re.findall(r"\d+", tensor.name)]
