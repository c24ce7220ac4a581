"""How a prompt was routed, of a model's forward pass."""

from __future__ import annotations

from transformers import PreTrainedModel

from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.routing_state import Routing
from alignx_ds.serve.jobs import Report


def report_of(model: PreTrainedModel, routing: Routing | None, experts: list[str]) -> Report | None:
    """Of the first prompt and the lowest gate, which decides in the shared scope. None: the model is dense."""
    if routing is None:
        return None
    layer, gate = next(iter(gates_of(model).items()))
    decision = routing.decisions[layer]
    gates = decision.gates if routing.forced is None else routing.forced
    return Report(
        gates=dict(zip(experts, gates[0].tolist(), strict=True)),
        confidence=float(decision.confidence()[0]),
        distance=float(gate.distance(routing.queries[layer])[0]),
    )
