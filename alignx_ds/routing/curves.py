"""The router's metrics at every step of stage 2: entropy, gates and choices by expert, ECE, share of padding.

The training loop averages a step's metrics over micro batches and ranks. A micro batch therefore gives sums
(`RouterSums`): their means are in proportion to the sums over the global batch, and ratios are taken last.

Shapes: B rows, T tokens, E experts, L gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from alignx_ds.data.batches import MicroBatch
from alignx_ds.mocae.gate import need_logits
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.parallel import ParallelMixture
from alignx_ds.routing.metrics import axis_overconfidence, overconfidence
from alignx_ds.training.metrics import RouterSums, StepMetrics


def router_sums(model: AlignXForCausalLM, part: MicroBatch) -> Callable[[], RouterSums]:
    """Of the forward pass just made with this micro batch; no other is made.

    The sums are computed when the result is called: that waits for the device twice. What they are computed from is
    kept until then. Rows without a prompt token (padding lines) are left out.
    """
    decisions = list(model.routing.decisions.values())
    logits = torch.stack([d.logits.detach() for d in decisions], dim=1)  # [B, L, E]
    return partial(_sums, logits, part, decisions[0].kind == "needs", *_slots(model))


@torch.no_grad()
def _sums(logits: Tensor, part: MicroBatch, needs: bool, slots: float, empty_slots: float) -> RouterSums:
    has_prompt = part.batch.prompt_mask.any(-1)  # [B]
    _, gates, experts = logits.shape
    needed = part.needs[has_prompt].repeat_interleave(gates, dim=0)
    seen = (_needs if needs else _choices)(logits[has_prompt].flatten(0, 1), needed)  # of [B·L, E]
    by_expert = [t.sum(0).double() for t in (seen.gates, seen.chosen, needed, needed * seen.chosen)]
    numbers = iter(torch.cat([seen.entropy.view(1), *by_expert, seen.overconfidence]).tolist())
    return RouterSums(
        decisions=float(len(seen.gates)),
        entropy=next(numbers),
        gates=list(islice(numbers, experts)),
        chosen=list(islice(numbers, experts)),
        rows=list(islice(numbers, experts)),
        own=list(islice(numbers, experts)),
        overconfidence=list(numbers),
        slots=slots,
        empty_slots=empty_slots,
    )


@dataclass(frozen=True)
class _Decisions:
    """N decisions: `gates` and `chosen` [N, E], summed `entropy` (nats), and the sums of `overconfidence` by bin."""

    gates: Tensor
    chosen: Tensor
    entropy: Tensor
    overconfidence: Tensor


def _choices(logits: Tensor, needed: Tensor) -> _Decisions:
    """The most probable expert is chosen; the bins are those of its probability."""
    gates = logits.softmax(-1).double()
    chosen = one_hot(gates.argmax(-1), gates.shape[-1])
    return _Decisions(gates, chosen, torch.special.entr(gates).sum(), overconfidence(gates, needed))


def _needs(logits: Tensor, needed: Tensor) -> _Decisions:
    """Every axis with a probability above a half is chosen, or else the generalist.

    The generalist's gate is the probability that no axis is needed. Every axis has bins of its own, and the ECE is the
    mean over the axes, as in `router_metrics`.
    """
    odds = need_logits(logits.double())
    yes, no = odds.sigmoid(), (-odds).sigmoid()
    axes = odds > 0
    gates, chosen = (
        torch.cat([none, some], dim=-1)
        for none, some in ((no.prod(-1, keepdim=True), yes), (~axes.any(-1, keepdim=True), axes))
    )
    entropy = (torch.special.entr(yes) + torch.special.entr(no)).sum()
    return _Decisions(gates, chosen.double(), entropy, axis_overconfidence(yes, needed[:, 1:]).flatten() / yes.shape[1])


def _slots(model: AlignXForCausalLM) -> tuple[float, float]:
    """(slots, empty slots) of the expert-parallel dispatch of all layers; zeros where experts are not dispatched."""
    dispatches = [m.dispatch for layer in alignx_layers(model) if isinstance(m := layer.mixture, ParallelMixture)]
    return float(sum(d.slots for d in dispatches)), float(sum(d.slots * d.padding_fraction for d in dispatches))


def step_scalars(experts: list[str], metrics: StepMetrics) -> dict[str, float]:
    """What is logged of a step of stage 2: loss and terms, and the router's metrics under router/; `experts` by id."""
    return metrics.scalars() | (router_scalars(experts, metrics.router) if metrics.router else {})


def router_scalars(experts: list[str], sums: RouterSums) -> dict[str, float]:
    """Entropy (nats), mean gate and share of decisions by expert, how often rows that need it choose it, ECE.

    In needs: the axes' summed entropies, their probabilities, and a decision can choose several of them.

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
