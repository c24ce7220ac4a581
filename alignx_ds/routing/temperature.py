"""The post-hoc softmax temperature of a gate (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math

from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from alignx_ds.data.labels import as_sets, set_nll
from alignx_ds.mocae.gate import need_logits


def fit_temperature(logits: Tensor, labels: Tensor, kind: str = "choice") -> float:
    """The T in (e⁻⁴, e⁴) that minimises the mean NLL of a gate of this kind, whose logits are divided by T.

    logits [N, E]; labels [N] int64, one expert for each prompt, or [N, E] multi-hot. In needs every axis counts for
    itself.
    """
    sets = as_sets(labels, logits.shape[-1]).double()

    def nll(log_t: float) -> float:
        divided = logits.double() / math.exp(log_t)
        if kind == "needs":
            return float(functional.binary_cross_entropy_with_logits(need_logits(divided), sets[:, 1:]))
        return float(set_nll(divided.log_softmax(-1), sets))

    return math.exp(float(minimize_scalar(nll, bounds=(-4.0, 4.0), method="bounded").x))
