"""The losses of fine-tuning and of stage 2. Each term of an optimizer step is a mean over the whole step: the language
model's over all answer tokens, any other over all rows, each of which counts alike, whatever its length.

DeepSpeed averages micro batches and ranks. The language model's sums are therefore scaled by the answer tokens of the
whole step (`MicroBatch.lm_scale`). The other terms are means over a micro batch: all micro batches of a step have the
same number of rows (`loop.micro_batches`), so their mean is that of all rows. So no term depends on the number of ranks
or of accumulation steps.

Shapes: B rows, T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alignx_ds.config.schema import AlignConfig
from alignx_ds.data.batches import Batch, MicroBatch
from alignx_ds.data.labels import set_nll
from alignx_ds.mocae.gate import CalibratedGate, Decision, Query, need_logits
from alignx_ds.mocae.layer import alignx_layers, output_calibrations
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.runtime import attention
from alignx_ds.training.metrics import MicroBatchLoss

MOST_LOGITS = 2**28  # fp32 logits that a loss takes at once: 1 GiB


def _summed_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [N, V], targets [N] -> fp32 scalar."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def _each_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [N, V], targets [N] -> [N] fp32."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def forward_nll(engine: Any, b: Batch, **inputs: Any) -> Tensor:
    """The answer tokens' summed NLL (nats, fp32) in the engine's forward pass with these inputs.

    `engine` may be a model too.

    The head computes only the logits that predict an answer's token. Where they are more than MOST_LOGITS, their fp32
    copies are made piece by piece, in the forward and in the backward pass.
    """
    return torch.stack(_by_piece(_summed_nll, engine, b, inputs)).sum()


def forward_each_nll(engine: Any, b: Batch, **inputs: Any) -> Tensor:
    """As `forward_nll`, but [N] fp32, of each of the N answer tokens in the order of `b.targets`."""
    return torch.cat(_by_piece(_each_nll, engine, b, inputs))


def _by_piece(nll: Callable[..., Tensor], engine: Any, b: Batch, inputs: dict[str, Any]) -> list[Tensor]:
    pieces = _pieces(engine, b, inputs)
    if len(pieces) == 1:
        return [nll(*pieces[0])]
    return [checkpoint(nll, *piece, use_reentrant=False) for piece in pieces]


def _head(engine: Any) -> Any:
    return getattr(engine, "module", engine).get_output_embeddings()


def _pieces(engine: Any, b: Batch, inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """(logits, targets) of the answer tokens of a forward pass, at most MOST_LOGITS at a time."""
    head = _head(engine)

    def select(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].flatten(0, 1).index_select(0, b.predicting).unsqueeze(0),)  # [1, N, d]

    hook = head.register_forward_pre_hook(select)
    try:
        logits = engine(**inputs).logits.squeeze(0)
    finally:
        hook.remove()
    rows = max(1, MOST_LOGITS // head.out_features)
    return list(zip(torch.split(logits, rows), torch.split(b.targets, rows), strict=True))


def language_loss(engine: Any, part: MicroBatch) -> MicroBatchLoss:
    """This micro batch's share of the step's mean NLL per answer token (nats), of padded or packed rows."""
    b, inputs = model_inputs(engine, part.batch)
    return MicroBatchLoss(forward_nll(engine, b, **inputs) * part.lm_scale)


def answer_log_probabilities(engine: Any, batch: Batch, count: int) -> Tensor:
    """[count] fp32: the summed log-probability (nats) of the answer of each example of a padded or packed batch."""
    b, inputs = model_inputs(engine, batch)
    each = forward_each_nll(engine, b, **inputs)
    assert b.owners is not None
    owners = b.owners.flatten()[b.predicting]
    return -each.new_zeros(count).index_add(0, owners, each)


def model_inputs(engine: Any, b: Batch) -> tuple[Batch, dict[str, Any]]:
    """(the batch as the model reads it, the arguments of a base model's forward pass), of padded or packed rows."""
    packed = b.position_ids is not None
    if packed and attention.reads_one_line(getattr(engine, "module", engine)):
        b = b.in_one_line()
    where = {"position_ids": b.position_ids} if packed else {"attention_mask": b.attention_mask}
    return b, {"input_ids": b.input_ids, "use_cache": False, **where}


@dataclass(frozen=True)
class AlignTerms:
    """Stage 2's terms of one micro batch, fp32 scalars, unweighted; all but `lm` are means over its rows."""

    lm: Tensor  # this micro batch's share of the step's mean NLL per answer token
    gating: Tensor  # cross-entropy of a row's label set, mean over the gates
    drift: Tensor  # ‖ỹ − y‖²/‖y‖² over a row's tokens, mean over the layers' output calibrations; 0 without them
    entropy: Tensor  # of a row's gates, mean over the gates
    prior: Tensor  # KL of a row's gates from the calibrators' own, mean over the gates

    def total(self, weights: AlignConfig) -> Tensor:
        """The weighted sum."""
        return (
            self.lm
            + weights.gating * self.gating
            + weights.drift * self.drift
            + weights.entropy * self.entropy
            + weights.prior * self.prior
        )

    def scalars(self) -> dict[str, Tensor]:
        """By name, without graphs, to be logged."""
        return {name: getattr(self, name).detach() for name in self.__dataclass_fields__}


def gating_terms(
    gate: CalibratedGate, query: Query, decision: Decision, needs: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy of the label set, entropy, KL from the calibrators' own gates) of one gate, in nats.

    Each is a mean over B rows; `needs` [B, E] fp32 is 1 for the experts that a row needs, and `weights` [B] is what
    each row counts in the cross-entropy. The calibrators' own gates are those of all terms of the gate but the trained
    linear one. A choice is one draw among the experts, and its target weighs those that are needed alike; needs are one
    draw per axis, yes or no, and a row's terms are the sums over its axes.
    """
    with torch.no_grad():
        prior = gate.calibrators_alone(query)
    if gate.settings.kind == "needs":
        gates, known = need_logits(decision.logits), need_logits(prior)
        log_yes, log_no = functional.logsigmoid(gates), functional.logsigmoid(-gates)
        yes, no = log_yes.exp(), log_no.exp()
        cross_entropy = functional.binary_cross_entropy_with_logits(gates, needs[:, 1:], reduction="none")
        entropy = -(yes * log_yes + no * log_no)
        divergence = yes * (log_yes - functional.logsigmoid(known)) + no * (log_no - functional.logsigmoid(-known))
        summed = cross_entropy.sum(-1) if weights is None else cross_entropy.sum(-1) * weights
        return summed.mean(), entropy.sum(-1).mean(), divergence.sum(-1).mean()
    log_gates, prior = decision.logits.log_softmax(-1), prior.log_softmax(-1)
    gates = log_gates.exp()
    entropy = -(gates * log_gates).sum(-1).mean()
    return set_nll(log_gates, needs, weights), entropy, (gates * (log_gates - prior)).sum(-1).mean()


def align_terms(
    model: AlignXForCausalLM, nll: Tensor, needs: Tensor, lm_scale: float, gate_weights: Tensor | None = None
) -> AlignTerms:
    """Stage 2's terms, after the model's forward pass of B rows.

    needs [B, E] and gate_weights [B] fp32; `lm_scale` turns the answers' summed NLL into its share of the step's mean
    over answer tokens. The gates' decisions and the drifts are those that the forward pass left in the model.
    """
    layers, routing = alignx_layers(model), model.routing
    per_gate = [
        gating_terms(
            layer.gate, routing.queries[layer.gate_layer], routing.decisions[layer.gate_layer], needs, gate_weights
        )
        for layer in layers
        if layer.gate is not None
    ]
    gating, entropy, prior = (torch.stack(column).mean() for column in zip(*per_gate, strict=True))
    drifts = [calibration.last_drift for calibration in output_calibrations(model)]
    drift = torch.stack([d.mean() for d in drifts if d is not None]).mean() if drifts else torch.zeros_like(gating)
    return AlignTerms(nll * lm_scale, gating, drift, entropy, prior)
