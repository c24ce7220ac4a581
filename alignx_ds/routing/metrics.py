"""The metrics of a router: accuracy, ECE, Brier score, NLL and the confusion matrix.

Shapes: N prompts, E experts. Labels are global expert ids.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BINS = 15  # equal-width confidence bins of the ECE


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """ECE = Σ_b (n_b / N)·|accuracy_b − confidence_b| over equal-width confidence bins b (Guo et al. 2017), in [0, 1].

    probabilities [N, E], labels [N] int64.
    """
    return float(overconfidence(probabilities, labels, bins).abs().sum()) / len(labels)


def overconfidence(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """Σ (confidence − correct) over the prompts of each confidence bin: [N, E], [N] -> [bins] fp64.

    These sums can be added over batches and ranks; the ECE, which takes their absolute values, can't.
    """
    confidence, chosen = probabilities.max(-1)
    gap = confidence.double() - (chosen == labels).double()
    index = (confidence.double() * bins).long().clamp(0, bins - 1)  # a NaN falls into some bin and shows there
    return gap.new_zeros(bins).index_add_(0, index, gap)


def router_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, ECE, Brier score (summed over experts) and NLL (nats) of softmax(logits) [N, E]; labels [N] int64."""
    p = logits.double().softmax(-1)
    one_hot = functional.one_hot(labels, p.shape[-1]).double()
    return {
        "accuracy": float((p.argmax(-1) == labels).double().mean()),
        "ece": expected_calibration_error(p, labels),
        "brier": float((p - one_hot).square().sum(-1).mean()),
        "nll": float(functional.cross_entropy(logits.double(), labels)),
    }


def confusion(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """Counts [E][E]: rows are the true expert, columns the chosen one. logits [N, E], labels [N] int64."""
    experts = logits.shape[-1]
    flat = labels * experts + logits.argmax(-1)
    counts: list[list[int]] = torch.bincount(flat, minlength=experts**2).view(experts, experts).tolist()
    return counts
