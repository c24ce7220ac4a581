"""The router's metrics at every step of stage 2: entropy, gates and choices by expert, ECE, share of padding.

The training loop averages a step's metrics over micro batches and ranks. A micro batch therefore gives sums
(`RouterSums`): their means are in proportion to the sums over the global batch, and ratios are taken last.

Shapes: B rows, T tokens, E experts, L gates.
"""

from __future__ import annotations

import math
from itertools import islice

import torch
from torch.nn.functional import one_hot

from alignx_ds.data.batches import MicroBatch
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.parallel import ParallelMixture
from alignx_ds.routing.metrics import overconfidence
from alignx_ds.training.metrics import RouterSums, StepMetrics


@torch.no_grad()
def router_sums(model: AlignXForCausalLM, part: MicroBatch) -> RouterSums:
    """Of the forward pass just made with this micro batch; no other is made.

    Rows without a prompt token (padding lines) are left out. Two transfers from the device.
    """
    has_prompt = part.batch.prompt_mask.any(-1)  # [B]
    probabilities = [d.probabilities().double() for d in model.routing.decisions.values()]
    decisions = torch.stack(probabilities, dim=1)[has_prompt]  # [B, L, E]
    gates, experts = decisions.flatten(0, 1), decisions.shape[-1]  # [B·L, E]
    needed = part.needs[has_prompt].repeat_interleave(decisions.shape[1], dim=0)
    chosen = one_hot(gates.argmax(-1), experts)
    by_expert = [t.sum(0).double() for t in (gates, chosen, needed, needed * chosen)]
    columns = [torch.special.entr(gates).sum().view(1), *by_expert, overconfidence(gates, needed)]
    numbers = iter(torch.cat(columns).tolist())
    slots, empty_slots = _slots(model)
    return RouterSums(
        decisions=float(len(gates)),
        entropy=next(numbers),
        gates=list(islice(numbers, experts)),
        chosen=list(islice(numbers, experts)),
        rows=list(islice(numbers, experts)),
        own=list(islice(numbers, experts)),
        overconfidence=list(numbers),
        slots=slots,
        empty_slots=empty_slots,
    )


def _slots(model: AlignXForCausalLM) -> tuple[float, float]:
    """(slots, empty slots) of the expert-parallel dispatch of all layers; zeros where experts are not dispatched."""
    dispatches = [m.dispatch for layer in alignx_layers(model) if isinstance(m := layer.mixture, ParallelMixture)]
    return float(sum(d.slots for d in dispatches)), float(sum(d.slots * d.padding_fraction for d in dispatches))


def step_scalars(experts: list[str], metrics: StepMetrics) -> dict[str, float]:
    """What is logged of a step of stage 2: loss and terms, and the router's metrics under router/; `experts` by id."""
    return metrics.scalars() | (router_scalars(experts, metrics.router) if metrics.router else {})


def router_scalars(experts: list[str], sums: RouterSums) -> dict[str, float]:
    """Entropy (nats), mean gate and share of decisions by expert, how often rows that need it choose it, ECE.

    An expert without rows in the step has no value for its own rows; nothing is returned when gates are not finite.
    """
    if not sums.decisions or not math.isfinite(sums.entropy):
        return {}
    found = {"router/entropy": sums.entropy / sums.decisions}
    for e, name in enumerate(experts):
        found[f"router/gate/{name}"] = sums.gates[e] / sums.decisions
        found[f"router/share/{name}"] = sums.chosen[e] / sums.decisions
        if sums.rows[e]:
            found[f"router/own/{name}"] = sums.own[e] / sums.rows[e]
    found["router/ece"] = math.fsum(map(abs, sums.overconfidence)) / sums.decisions
    if sums.slots:
        found["router/padding"] = sums.empty_slots / sums.slots
    return found
