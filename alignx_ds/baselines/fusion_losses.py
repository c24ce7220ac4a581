"""The losses of H3Fusion (arXiv 2411.17792) and TrinityX (arXiv 2509.08486) beside the language model's.

Each term is a mean over the rows of a micro batch, whatever their length, and all micro batches of a step have the same
number of rows. So its mean over micro batches and ranks is the mean over all rows of the step. `drift` needs no rows.

Shapes: B rows, T tokens, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alignx_ds.baselines.fusion import FullExperts, fusion_layers
from alignx_ds.config.schema import FusionConfig


@dataclass(frozen=True)
class FusionTerms:
    """fp32 scalars, unweighted. Entropy and `uniform` add up to log E: only the difference of their weights counts."""

    lm: Tensor  # this micro batch's share of the step's mean NLL per answer token
    gating: Tensor  # cross-entropy of the axes that a row needs under its mean gates
    drift: Tensor  # relative squared distance of the experts from where they started
    entropy: Tensor  # of a token's gates
    uniform: Tensor  # KL of a token's gates from uniform ones

    def total(self, weights: FusionConfig) -> Tensor:
        """The weighted sum."""
        return (
            self.lm
            + weights.gating * self.gating
            + weights.drift * self.drift
            + weights.entropy * self.entropy
            + weights.uniform * self.uniform
        )

    def scalars(self) -> dict[str, Tensor]:
        """By name, without graphs, to be logged."""
        return {name: getattr(self, name).detach() for name in self.__dataclass_fields__}


def gate_terms(
    logits: Tensor, mask: Tensor, axes: Tensor, temperature: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(cross-entropy of a row's axes under its mean gates, mean entropy of a token's gates), in nats, of one layer.

    `logits` [B, T, E]; `mask` [B, T] is 1 for real tokens and 0 for padding; `axes` [B, E] is 1 for the experts of the
    axes that a row needs, which weigh alike. A row that needs none has no expert, so its gating loss is 0. `weights`
    [B] is what each row counts in the cross-entropy, as when AlignX's gate is fitted; 1 if not given.
    """
    log_gates = (logits.float() / temperature).log_softmax(-1)
    real = mask.unsqueeze(-1).bool()
    tokens = real.sum((1, 2))
    summed = log_gates.masked_fill(~real, -torch.inf).logsumexp(1)  # [B, E], of the gates: no gate is too small for it
    shares = axes / axes.sum(1, keepdim=True).clamp(min=1)
    missed = torch.where(shares > 0, shares * (tokens.log().unsqueeze(1) - summed), 0.0).sum(1)
    missed = missed if weights is None else missed * weights
    entropy = -(log_gates.exp() * log_gates * real).sum((1, 2)) / tokens
    return missed.mean(), entropy.mean()


class Drift:
    """Σᵢ sᵢ‖θᵢ − θᵢ*‖²/‖θ*‖² of the experts' weights; θ* are those at its construction, of which it keeps a copy.

    `scales` are s, one per expert; without them each is 1.
    """

    def __init__(self, model: nn.Module, scales: list[float] | None = None) -> None:
        self.scales = scales
        self.start = [w.detach().clone() for w in _weights(model)]
        self.size = sum(float(w.float().square().sum()) for w in self.start)

    def of(self, model: nn.Module) -> Tensor:
        """fp32 scalar, of the model's weights as they are now."""
        moved = zip(_weights(model), self.start, strict=True)
        return torch.stack([self._scaled((w.float() - start).square()) for w, start in moved]).sum() / self.size

    def _scaled(self, squares: Tensor) -> Tensor:
        """[E, m, n] -> scalar."""
        if self.scales is None:
            return squares.sum()
        return (squares.sum((1, 2)) * squares.new_tensor(self.scales)).sum()


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [w for layer in fusion_layers(model) for w in layer.weights.parameters()]


def fusion_terms(
    layers: list[FullExperts], lm: Tensor, drift: Tensor, mask: Tensor, axes: Tensor, weights: Tensor | None = None
) -> FusionTerms:
    """All terms, after the model's forward pass in training mode of rows with this mask [B, T]: means over the layers.

    `lm` and `drift` are passed through; `axes` [B, E] and `weights` [B] as in `gate_terms`.
    """
    per_layer = []
    for layer in layers:
        assert layer.logits is not None, "the gates' logits are kept in training only"
        logits = layer.logits.view(*mask.shape, -1)
        per_layer.append(gate_terms(logits, mask, axes, layer.settings.temperature, weights))
    gating, entropy = (torch.stack(column).mean() for column in zip(*per_layer, strict=True))
    return FusionTerms(lm, gating, drift, entropy, math.log(layers[0].num_experts) - entropy)
