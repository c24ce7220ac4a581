"""The router's metrics by source of prompts: those that a gate was fitted for, and those that it has never seen.

A gate can be right about the sources that it knows and wrong, though certain, beyond them. So it is measured on each
expert's own held-out prompts, on those of each source of routing rows, and on the extra sets whose needs are known.
Shapes: N prompts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from alignx_ds.data.encode import LabelledExamples
from alignx_ds.data.inputs import EncodedData
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.gate_terms import gate_terms, sum_of
from alignx_ds.routing.metrics import axis_metrics, mean_confidence, router_metrics

Kind = Literal["own", "routing", "set"]


@dataclass(frozen=True)
class SourceMetrics:
    """Of the prompts of one source: an expert's own held-out ones, those of routing rows, or those of an extra set."""

    kind: Kind
    prompts: int
    confidence: float  # mean
    metrics: dict[str, float]  # as of `router_metrics`
    axes: dict[str, dict[str, float]]  # ECE and Brier score of each axis's forecasts

    def content(self) -> dict[str, Any]:
        """For JSON: all fields, and the metrics among them."""
        fields = {"kind": self.kind, "prompts": self.prompts, **self.metrics}
        return fields | {"confidence": self.confidence, "axes": self.axes}


def by_source(
    model: AlignXForCausalLM, data: EncodedData, routed: Tensor, experts: list[str], pad_id: int, batch: int
) -> dict[str, SourceMetrics]:
    """Metrics of the lowest gate by source, own sources first. Collective.

    `routed` [N, E] are its logits on `data.routed`, divided by the post-hoc temperature, as all are that are measured.
    """
    lowest, gate = next(iter(gates_of(model).items()))
    kind, temperature = gate.settings.kind, float(gate.calibration_temperature)

    def measured(of: Kind, logits: Tensor, labels: Tensor) -> SourceMetrics:
        axes = dict(zip(experts[1:], axis_metrics(logits, labels, kind), strict=True))
        metrics = router_metrics(logits, labels, kind)
        return SourceMetrics(of, len(labels), mean_confidence(logits, kind), metrics, axes)

    labels, found = data.routed.multi_hot(len(experts)), {}
    for expert, name in enumerate(experts):
        own = [i for i, owner in enumerate(data.routed.experts) if owner == expert]
        if own:
            found[name] = measured("own", routed[own], labels[own])
    others: list[tuple[Kind, dict[str, LabelledExamples]]] = [("routing", data.routing), ("set", data.sets)]
    for of, sources in others:
        for name, rows in sources.items():
            logits = sum_of(gate_terms(model, rows, pad_id, batch)[lowest]) / temperature
            found[name] = measured(of, logits, rows.multi_hot(len(experts)))
    return found
