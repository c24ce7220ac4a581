"""What the stages minimise. Every term is a sum over rows or tokens with a global normaliser, so that no term depends
on the world size or on the accumulation steps.

Shapes: B rows, T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alignx_ds.config.schema import AlignConfig
from alignx_ds.data.batches import IGNORED, MicroBatch
from alignx_ds.mocae.gate import CalibratedGate, Decision, Query
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXForCausalLM


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood of the answer tokens, fp32 scalar: logits [B, T, V], labels [B, T]."""
    shifted = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def language_loss(engine: Any, part: MicroBatch) -> tuple[Tensor, dict[str, float]]:
    """This part's share of the mean NLL over the step's answer tokens, of padded or packed rows."""
    b = part.batch
    packed = b.position_ids is not None
    where = {"position_ids": b.position_ids} if packed else {"attention_mask": b.attention_mask}
    output = engine(input_ids=b.input_ids, use_cache=False, **where)
    return answer_nll(output.logits, b.labels) * part.lm_scale, {}


@dataclass(frozen=True)
class AlignTerms:
    """The terms of stage 2's loss, each a mean over rows (or answer tokens), unweighted."""

    lm: Tensor
    gating: Tensor
    drift: Tensor
    entropy: Tensor
    prior: Tensor

    def total(self, weights: AlignConfig) -> Tensor:
        return (
            self.lm
            + weights.gating * self.gating
            + weights.drift * self.drift
            + weights.entropy * self.entropy
            + weights.prior * self.prior
        )

    def scalars(self) -> dict[str, float]:
        return {name: float(getattr(self, name).detach()) for name in self.__dataclass_fields__}


def gating_terms(
    gate: CalibratedGate, query: Query, decision: Decision, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy of the axis label, entropy, KL from the calibrators' own gates) of one gate, means over rows.

    Of B rows; experts [B] int64 (the expert that each row belongs to).
    """
    log_gates = decision.logits.log_softmax(-1)
    gates = log_gates.exp()
    with torch.no_grad():
        parts = gate.parts(query)
        prior = torch.stack([term for name, term in parts.items() if name != "linear"]).sum(0).log_softmax(-1)
    entropy = -(gates * log_gates).sum(-1).mean()
    return functional.nll_loss(log_gates, experts), entropy, (gates * (log_gates - prior)).sum(-1).mean()


def align_terms(
    model: AlignXForCausalLM, logits: Tensor, labels: Tensor, experts: Tensor, lm_scale: float
) -> AlignTerms:
    """Stage 2's terms after a forward pass. `lm_scale` turns the summed NLL into the global mean over tokens."""
    layers, routing = alignx_layers(model), model.routing
    per_gate = [
        gating_terms(layer.gate, routing.queries[layer.gate_layer], routing.decisions[layer.gate_layer], experts)
        for layer in layers
        if layer.gate is not None
    ]
    gating, entropy, prior = (torch.stack(column).mean() for column in zip(*per_gate, strict=True))
    drifts = [layer.calibration.last_drift for layer in layers]
    drift = torch.stack([d.mean() for d in drifts if d is not None]).mean()
    return AlignTerms(answer_nll(logits, labels) * lm_scale, gating, drift, entropy, prior)
