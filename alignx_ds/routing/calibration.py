"""How far a router's confidence can be believed: accuracy, ECE, Brier, NLL and the post-hoc temperature."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

BINS = 15


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that minimises the NLL of softmax(logits / T) (Guo et al. 2017). logits [N, E], labels [N]."""

    def nll(log_t: float) -> float:
        return float(functional.cross_entropy(logits.double() / math.exp(log_t), labels))

    return math.exp(float(minimize_scalar(nll, bounds=(-4.0, 4.0), method="bounded").x))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Mean |confidence − accuracy| over equal-width confidence bins, weighted by their rows. probabilities [N, E]."""
    return float(overconfidence(probabilities, labels, bins).abs().sum()) / len(labels)


def overconfidence(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """Confidence − accuracy, summed over the rows of each confidence bin: [N, E], [N] -> [bins] fp64.

    The sums of parts of the rows add up to the whole's, which the error itself does not.
    """
    confidence, chosen = probabilities.max(-1)
    gap = confidence.double() - (chosen == labels).double()
    index = (confidence.double() * bins).long().clamp(0, bins - 1)  # what is no number is in some bin, and shows there
    return gap.new_zeros(bins).index_add_(0, index, gap)


def router_figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, ECE, Brier score (sum over classes) and NLL of a router. logits [N, E], labels [N]."""
    p = logits.double().softmax(-1)
    one_hot = functional.one_hot(labels, p.shape[-1]).double()
    return {
        "accuracy": float((p.argmax(-1) == labels).double().mean()),
        "ece": expected_calibration_error(p, labels),
        "brier": float((p - one_hot).square().sum(-1).mean()),
        "nll": float(functional.cross_entropy(logits.double(), labels)),
    }


def confusion(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """Rows: the true expert; columns: the chosen one."""
    experts = logits.shape[-1]
    flat = labels * experts + logits.argmax(-1)
    counts: list[list[int]] = torch.bincount(flat, minlength=experts**2).view(experts, experts).tolist()
    return counts
