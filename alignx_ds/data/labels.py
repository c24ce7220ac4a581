"""Label sets: which experts a prompt needs. A prompt can need several axes, or none: then its set is {generalist}.

Shapes: N prompts, E experts; the generalist is expert 0.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
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


def known_set(row: Row, otherwise: Sequence[str], names: Sequence[str]) -> LabelSet | None:
    """The experts that a row of an evaluation set needs: what it says itself, otherwise these, None if neither does.

    It is None too where one of them is none of those with these `names`: nothing is fitted on a set, so its labels may
    be those of other axes.
    """
    needs = row.needs or otherwise
    return named_set(needs, names, row.place) if needs and set(needs) <= set(names) else None


def multi_hot(sets: Sequence[LabelSet], experts: int) -> Tensor:
    """[N, E] fp32: 1 where a prompt needs an expert; column 0 is 1 exactly where it needs no axis."""
    made = torch.zeros(len(sets), experts)
    for line, needed in enumerate(sets):
        made[line, list(needed)] = 1
    return made


def as_sets(labels: Tensor, experts: int) -> Tensor:
    """[N, E]: labels that are multi-hot already as they are, and labels [N] int64, of one expert each, as one-hot."""
    return functional.one_hot(labels, experts).float() if labels.dim() == 1 else labels


def set_nll(log_probabilities: Tensor, sets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy (nats) of the distributions that weigh all experts of a set alike: [N, E], [N, E] -> scalar.

    For sets of one expert this is the mean NLL of those experts, to the last bit. Each prompt's term is multiplied by
    its weight [N].
    """
    shares = sets.to(log_probabilities.dtype) / sets.sum(-1, keepdim=True)
    expected = torch.where(shares > 0, shares * log_probabilities, 0.0).sum(-1, keepdim=True)
    expected = expected if weights is None else expected * weights[:, None]
    return functional.nll_loss(expected, torch.zeros(len(sets), dtype=torch.long, device=sets.device))


def one_by_one(
    sets: Sequence[LabelSet], weights: Tensor | None = None
) -> tuple[list[int], list[int], list[float] | None]:
    """(numbers of the prompts, experts, weights) for a classifier with one label a row: a prompt is there once for
    each expert of its set, and those rows have its weight together. The weights are None where all are 1.
    """
    whole = [1.0] * len(sets) if weights is None else weights.tolist()
    found = [(line, expert, whole[line] / len(needed)) for line, needed in enumerate(sets) for expert in needed]
    lines, experts, shares = (list(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    return lines, experts, shares if weights is not None or len(found) > len(sets) else None


def source_weights(owners: Sequence[int], sources: Sequence[int]) -> Tensor | None:
    """[N] fp32: what each prompt counts when a gate is fitted, or None where every expert has a single source.

    Each source weighs as the root of its size among the sources of its owner, whose prompts weigh as much as there are
    of them. So a large source does not drown a small one, and a handful of prompts does not rule a gate.
    """
    sizes = Counter(zip(owners, sources, strict=True))
    rows: dict[int, int] = defaultdict(int)
    roots: dict[int, float] = defaultdict(float)
    several = Counter(owner for owner, _ in sizes)
    for (owner, _), size in sizes.items():
        rows[owner] += size
        roots[owner] += math.sqrt(size)
    if not any(count > 1 for count in several.values()):
        return None
    of = {
        (owner, source): rows[owner] / (roots[owner] * math.sqrt(size)) if several[owner] > 1 else 1.0
        for (owner, source), size in sizes.items()
    }
    return torch.tensor([of[pair] for pair in zip(owners, sources, strict=True)])


def source_repeats(owners: Sequence[int], sources: Sequence[int]) -> list[int]:
    """[N]: how often each prompt stands for itself where prompts can't be weighed: about its weight over the least."""
    weights = source_weights(owners, sources)
    if weights is None:
        return [1] * len(owners)
    least: dict[int, float] = {}
    for owner, weight in zip(owners, weights.tolist(), strict=True):
        least[owner] = min(weight, least.get(owner, weight))
    return [round(weight / least[owner]) for owner, weight in zip(owners, weights.tolist(), strict=True)]


def source_quotas(sizes: Sequence[int], count: int) -> list[int]:
    """How many prompts to take of sources of these sizes, `count` in all or fewer: as many as the roots' shares."""
    quotas = [0] * len(sizes)
    for place, number in enumerate(order := sorted(range(len(sizes)), key=lambda i: sizes[i])):
        roots = [math.sqrt(sizes[i]) for i in order[place:]]
        quotas[number] = min(sizes[number], round((count - sum(quotas)) * roots[0] / sum(roots)))
    return quotas
