"""The post-hoc temperature of a gate (Guo et al. 2017, arXiv 1706.04599), fitted to smoothed labels (Platt 1999).

Where a gate tells all calibration prompts apart, the likelihood of their labels grows as long as the temperature falls,
and a gate with such a temperature is certain of every prompt, also of a stranger. Among n prompts that were all right
the next one is right with probability (n + 1)/(n + 2) (Laplace's rule of succession): that is what a label is worth.
Shapes: N prompts, E experts.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from alignx_ds.data.labels import as_sets
from alignx_ds.mocae.gate import need_logits


def fit_temperature(logits: Tensor, labels: Tensor, kind: str = "choice", weights: Tensor | None = None) -> float:
    """The T in (e⁻⁴, e⁴) that minimises the mean NLL of a gate of this kind, whose logits are divided by T.

    logits [N, E]; labels [N] int64, one expert for each prompt, or [N, E] multi-hot; weights [N], 1 if not given. In
    needs every axis counts for itself.
    """
    sets = as_sets(labels, logits.shape[-1]).double()
    targets = smoothed_needs(sets[:, 1:]) if kind == "needs" else smoothed_choice(sets)

    def nll(log_t: float) -> float:
        divided = logits.double() / math.exp(log_t)
        reduction = "mean" if weights is None else "none"
        if kind == "needs":
            found = functional.binary_cross_entropy_with_logits(need_logits(divided), targets, reduction=reduction)
        else:
            found = functional.cross_entropy(divided, targets, reduction=reduction)
        return float(found if weights is None else (found.view(len(sets), -1).mean(-1) * weights).mean())

    return math.exp(float(minimize_scalar(nll, bounds=(-4.0, 4.0), method="bounded").x))


def smoothed_choice(sets: Tensor) -> Tensor:
    """Label sets [N, E] -> targets [N, E]: (n + 1)/(n + 2) for the expert of a row, of whose prompts there are n.

    Several experts of a row weigh alike. The other experts that any row needs share the rest; where there are none, a
    row's targets are not smoothed.
    """
    count, own = sets.sum(0), sets / sets.sum(-1, keepdim=True)
    others = (count > 0) * (1 - sets)
    rest = torch.where(others.sum(-1) > 0, own @ (1 / (count + 2)), 0.0)[:, None]
    return (1 - rest) * own + rest * others / others.sum(-1, keepdim=True).clamp_min(1)


def smoothed_needs(needed: Tensor) -> Tensor:
    """Labels [N, A], 1 where an axis is needed -> targets: (n₊ + 1)/(n₊ + 2) of the axis's n₊ such rows, 1/(n₋ + 2).

    As Platt 1999 does (Probabilistic outputs for support vector machines). An axis that every row needs, or none, keeps
    its labels.
    """
    positive = needed.sum(0)
    negative = len(needed) - positive
    smoothed = torch.where(needed > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    return torch.where((positive > 0) & (negative > 0), smoothed, needed)
