"""The post-hoc softmax temperature of a gate (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math

from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in (e⁻⁴, e⁴) that minimises the mean NLL of softmax(logits / T). logits [N, E], labels [N] int64."""

    def nll(log_t: float) -> float:
        return float(functional.cross_entropy(logits.double() / math.exp(log_t), labels))

    return math.exp(float(minimize_scalar(nll, bounds=(-4.0, 4.0), method="bounded").x))
