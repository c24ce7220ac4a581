"""Label sets: which experts a prompt needs. A prompt can need several axes, or none: then its set is {generalist}.

Shapes: N prompts, E experts; the generalist is expert 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from alignx_ds.data.rows import Row
from alignx_ds.errors import DataError

LabelSet = tuple[int, ...]  # expert ids, sorted; (0,): the generalist alone


def label_set(row: Row, names: Sequence[str], owner: int) -> LabelSet:
    """The experts that a row needs, of those with these names; `owner` where it does not say. Raises DataError."""
    return named_set(row.needs, names, row.place) if row.needs else (owner,)


def named_set(needs: Sequence[str], names: Sequence[str], place: str) -> LabelSet:
    """The ids of these experts; `names` are all there are. Raises DataError, naming `place`, for another name."""
    for name in needs:
        if name not in names:
            raise DataError(f"{place}: the label {name!r} is no expert; there are {', '.join(names)}")
    return tuple(sorted({names.index(name) for name in needs} - {0})) or (0,)


def multi_hot(sets: Sequence[LabelSet], experts: int) -> Tensor:
    """[N, E] fp32: 1 where a prompt needs an expert; column 0 is 1 exactly where it needs no axis."""
    made = torch.zeros(len(sets), experts)
    for line, needed in enumerate(sets):
        made[line, list(needed)] = 1
    return made


def as_sets(labels: Tensor, experts: int) -> Tensor:
    """[N, E]: labels that are multi-hot already as they are, and labels [N] int64, of one expert each, as one-hot."""
    return functional.one_hot(labels, experts).float() if labels.dim() == 1 else labels


def set_nll(log_probabilities: Tensor, sets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of the distributions that weigh all experts of a set alike: [N, E], [N, E] -> scalar.

    For sets of one expert this is the mean NLL of those experts, to the last bit.
    """
    shares = sets.to(log_probabilities.dtype) / sets.sum(-1, keepdim=True)
    expected = torch.where(shares > 0, shares * log_probabilities, 0.0).sum(-1, keepdim=True)
    return functional.nll_loss(expected, torch.zeros(len(sets), dtype=torch.long, device=sets.device))


def one_by_one(sets: Sequence[LabelSet]) -> tuple[list[int], list[int], list[float] | None]:
    """(numbers of the prompts, experts, weights) for a classifier with one label a row: a prompt is there once for
    each expert of its set, and those rows weigh 1 together. The weights are None where all are 1.
    """
    found = [(line, expert, 1 / len(needed)) for line, needed in enumerate(sets) for expert in needed]
    lines, experts, weights = (list(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    return lines, experts, weights if len(found) > len(sets) else None
