"""What stage 1 can minimise besides the NLL of good answers: each paper's loss, as a function of log-probabilities.

All tensors are [N] fp32, one entry a row. A log-probability is that of a whole answer given its prompt, in nats, summed
over the answer's tokens; where an argument's name ends in `per_token` it is their mean. `reference` is the same under
the weights that training starts from. Every function returns [N] losses, of which training takes the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignx_ds.config.schema import JUDGED, PAIRED, AxisConfig

CERTAIN = -1e-7  # a larger log-probability has no finite odds in fp32


@dataclass(frozen=True)
class Objective:
    """What a loss needs, and the β that its paper recommends."""

    beta: float
    has_reference: bool = True
    sft_weight: float = 0.0  # of the good answers' NLL, which is part of the loss


OBJECTIVES = {
    "poft": Objective(1.0),
    "dpo": Objective(0.1),
    "orpo": Objective(0.1, has_reference=False, sft_weight=1.0),
    "simpo": Objective(2.0, has_reference=False),
    "kto": Objective(0.1),
    "bco": Objective(0.1),
}


@dataclass(frozen=True)
class Settings:
    """An axis's objective with all of its numbers."""

    name: str
    beta: float
    margin: float
    sft_weight: float
    bad_weight: float  # 0: as many good answers as there are to a bad one

    @classmethod
    def of(cls, axis: AxisConfig) -> Settings:
        known = OBJECTIVES[axis.objective]
        sft_weight = known.sft_weight or axis.sft_weight
        return cls(axis.objective, axis.beta or known.beta, axis.margin, sft_weight, axis.bad_weight)

    @property
    def paired(self) -> bool:
        """Whether a row is two answers to one prompt."""
        return self.name in PAIRED

    @property
    def judged(self) -> bool:
        """Whether a row is one answer, good or bad."""
        return self.name in JUDGED

    @property
    def has_reference(self) -> bool:
        return OBJECTIVES[self.name].has_reference


def dpo(good: Tensor, bad: Tensor, good_reference: Tensor, bad_reference: Tensor, beta: float) -> Tensor:
    """−log σ(β (log π(y⁺)/π₀(y⁺) − log π(y⁻)/π₀(y⁻))). Rafailov et al. 2023, arXiv 2305.18290, eq. 7."""
    return -logsigmoid(beta * ((good - good_reference) - (bad - bad_reference)))


def orpo(good_per_token: Tensor, bad_per_token: Tensor, beta: float) -> Tensor:
    """−β log σ(log odds(y⁺) − log odds(y⁻)), odds = P/(1 − P), log P the mean over an answer's tokens.

    Hong et al. 2024, arXiv 2403.07691, eq. 3 to 7, whose λ is β. Its NLL of the good answers is added by the caller.
    """
    return -beta * logsigmoid(_log_odds(good_per_token) - _log_odds(bad_per_token))


def _log_odds(log_probability: Tensor) -> Tensor:
    bounded = log_probability.clamp(max=CERTAIN)
    return bounded - torch.log(-torch.expm1(bounded))


def simpo(good_per_token: Tensor, bad_per_token: Tensor, beta: float, margin: float) -> Tensor:
    """−log σ(β log P(y⁺) − β log P(y⁻) − γ), log P as in `orpo`. Meng et al. 2024, arXiv 2405.14734, eq. 6."""
    return -logsigmoid(beta * (good_per_token - bad_per_token) - margin)


def kto(
    answer: Tensor, reference: Tensor, good: Tensor, shift: Tensor | float, beta: float, bad_weight: float
) -> Tensor:
    """λ (1 − σ(± β (log π(y)/π₀(y) − z₀))), + and λ = 1 for good answers, − and λ = `bad_weight` for bad ones.

    `good` is 1 or 0. The `shift` z₀ is an estimate of KL(π ‖ π₀) in nats, 0 at least, and carries no gradient.
    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8, less the constant λ.
    """
    sign, weight = 2 * good - 1, good + bad_weight * (1 - good)
    return weight * (1 - torch.sigmoid(sign * beta * (answer - reference - shift)))


def bco(
    answer: Tensor, reference: Tensor, good: Tensor, shift: Tensor | float, beta: float, weights: Tensor | float = 1.0
) -> Tensor:
    """−w log σ(± (β log π(y)/π₀(y) − δ)), + for good answers, − for bad ones; `good` is 1 or 0.

    The `shift` δ is halfway between the mean rewards of good and of bad answers, without a gradient. The `weights` w
    match the bad answers' prompts to those of the good answers; they are 1 for good ones. Jung et al. 2024, arXiv
    2404.04656: the reward shift and the underlying distribution matching.
    """
    return -weights * logsigmoid((2 * good - 1) * (beta * (answer - reference) - shift))


def poft(per_token: Tensor, reference_per_token: Tensor, beta: float) -> Tensor:
    """−log σ(β (log P(y) − log P₀(y))), log P as in `orpo`: a row counts less, the likelier it already is.

    Fan et al. 2024, arXiv 2412.12865: the Bradley-Terry model that prefers the trained model to an aligned one on one
    and the same answer. Here that is the model that training starts from, and P is per token, so that long rows do not
    saturate σ.
    """
    return -logsigmoid(beta * (per_token - reference_per_token))
