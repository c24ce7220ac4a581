"""The metrics of a router: accuracy, ECE, Brier score, NLL and the confusion matrix.

A gate that chooses is right if the expert that it chooses is in the prompt's label set. A gate of needs gives one
forecast per axis; it takes those above a half to be needed, and is right if they are exactly the prompt's set.
Shapes: N prompts, E experts. Labels are global expert ids [N] int64, or label sets [N, E], multi-hot.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from alignx_ds.data.labels import as_sets, set_nll
from alignx_ds.mocae.gate import confidence, need_logits

BINS = 15  # equal-width confidence bins of the ECE


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """ECE = Σ_b (n_b / N)·|accuracy_b − confidence_b| over equal-width confidence bins b (Guo et al. 2017), in [0, 1].

    probabilities [N, E], labels [N] int64 or [N, E].
    """
    return float(overconfidence(probabilities, labels, bins).abs().sum()) / len(labels)


def overconfidence(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """Σ (confidence − correct) over the prompts of each confidence bin: [N, E], [N] or [N, E] -> [bins] fp64.

    These sums can be added over batches and ranks; the ECE, which takes their absolute values, can't.
    """
    confidence, chosen = probabilities.max(-1)
    correct = as_sets(labels, probabilities.shape[-1]).gather(-1, chosen[:, None])[:, 0]
    return _gaps(confidence.double(), correct.double(), bins)


def _gaps(forecasts: Tensor, outcomes: Tensor, bins: int) -> Tensor:
    """Σ (forecast − outcome) by bin of the forecast: [N] fp64 each -> [bins] fp64."""
    index = (forecasts * bins).long().clamp(0, bins - 1)  # a NaN falls into some bin and shows there
    return forecasts.new_zeros(bins).index_add_(0, index, forecasts - outcomes)


def mean_confidence(logits: Tensor, kind: str = "choice") -> float:
    """The mean, over prompts, of a gate's confidence in what it takes for most likely: logits [N, E]."""
    return float(confidence(logits.double(), kind).mean())


def axis_overconfidence(forecasts: Tensor, needed: Tensor, bins: int = BINS) -> Tensor:
    """As `overconfidence`, of each axis's forecasts that it is needed: [N, A], [N, A] -> [A, bins] fp64."""
    return torch.stack([_gaps(p.double(), y.double(), bins) for p, y in zip(forecasts.T, needed.T, strict=True)])


def axis_forecasts(logits: Tensor, kind: str = "choice") -> Tensor:
    """[N, E] -> [N, E − 1] fp64: the gate's probability that each axis is the right one, or that it is needed."""
    return need_logits(logits.double()).sigmoid() if kind == "needs" else logits.double().softmax(-1)[:, 1:]


def axis_metrics(logits: Tensor, labels: Tensor, kind: str = "choice") -> list[dict[str, float]]:
    """By axis: ECE and Brier score of its forecasts, each taken as that of an event which happens or doesn't."""
    forecasts, needed = axis_forecasts(logits, kind), as_sets(labels, logits.shape[-1])[:, 1:].double()
    eces = axis_overconfidence(forecasts, needed).abs().sum(-1) / len(forecasts)
    briers = (forecasts - needed).square().mean(0)
    return [{"ece": ece, "brier": brier} for ece, brier in zip(eces.tolist(), briers.tolist(), strict=True)]


def router_metrics(logits: Tensor, labels: Tensor, kind: str = "choice") -> dict[str, float]:
    """Accuracy, ECE, Brier score and NLL (nats) of a gate of this kind with these logits [N, E]; labels [N] or [N, E].

    In a choice: of softmax(logits) as one forecast over all experts, its Brier score summed over them; where a prompt
    needs several, Brier score and NLL are against the distribution that weighs them alike. In needs: ECE, Brier score
    and NLL are means over the axes.
    """
    sets = as_sets(labels, logits.shape[-1]).double()
    if kind == "needs":
        odds, by_axis = need_logits(logits.double()), axis_metrics(logits, sets, kind)
        return {
            "accuracy": float(((odds > 0) == (sets[:, 1:] > 0)).all(-1).double().mean()),
            "ece": sum(m["ece"] for m in by_axis) / len(by_axis),
            "brier": sum(m["brier"] for m in by_axis) / len(by_axis),
            "nll": float(functional.binary_cross_entropy_with_logits(odds, sets[:, 1:])),
        }
    p = logits.double().softmax(-1)
    return {
        "accuracy": float(sets.gather(-1, p.argmax(-1, keepdim=True)).mean()),
        "ece": expected_calibration_error(p, sets),
        "brier": float((p - sets / sets.sum(-1, keepdim=True)).square().sum(-1).mean()),
        "nll": float(set_nll(logits.double().log_softmax(-1), sets)),
    }


def confusion(logits: Tensor, labels: Tensor, kind: str = "choice") -> list[list[int]]:
    """Counts [E, E]: rows are the experts that a prompt needs, columns those that the gate takes for it.

    logits [N, E], labels [N] int64 or [N, E]. A prompt counts once in the row of each expert that it needs. In needs,
    the gate can take several: what another of the prompt's needs calls for is left out of a row, and where nothing is
    left, the need is met by the generalist.
    """
    needed = as_sets(labels, logits.shape[-1]).double()
    if kind == "needs":
        axes = (need_logits(logits) > 0).double()
        taken = torch.cat([(axes.sum(-1, keepdim=True) == 0).double(), axes], dim=-1)
        met, strange = needed * taken, (1 - needed) * taken
        counts = needed.T @ strange + torch.diag(met.sum(0))
        nothing = needed * (1 - taken) * (strange.sum(-1, keepdim=True) == 0)
        counts[:, 0] += nothing.sum(0)
    else:
        counts = needed.T @ functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    whole: list[list[int]] = counts.long().tolist()
    return whole
