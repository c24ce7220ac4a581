"""What the router does while stage 2 trains it, as curves: how sure it is, whom it chooses, and what that costs.

The loop averages a step's figures over micro batches and ranks. So a micro batch gives sums, whose means are in
proportion to the sums over the global batch, and the ratios are made of them last: they are those of all its prompts.

Shapes: B rows, T tokens, E experts, L gates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from alignx_ds.data.batches import MicroBatch
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.parallel import ParallelMixture
from alignx_ds.routing.metrics import BINS, overconfidence
from alignx_ds.training.keeper import Scribe

SUM = "sum of router/"  # before the name of what the loop averages, and no curve shows


@torch.no_grad()
def router_sums(model: AlignXForCausalLM, part: MicroBatch) -> dict[str, float]:
    """Of the forward pass just made, which need not be repeated; two questions to the device.

    A decision is a gate's about a row's prompt; a line of nothing but padding is no row.
    """
    asked = part.batch.prompt_mask.any(-1)  # [B]
    decisions = torch.stack([d.probabilities().double() for d in model.routing.decisions.values()], dim=1)[asked]
    gates, experts = decisions.flatten(0, 1), decisions.shape[-1]  # [B·L, E]
    labels = part.experts[asked].repeat_interleave(decisions.shape[1])
    own, chosen = one_hot(labels, experts), one_hot(gates.argmax(-1), experts)
    by_expert = {"gate": gates, "share": chosen, "rows": own, "own": own * chosen}
    found: dict[str, Tensor] = {f"{kind}/{e}": t[:, e].sum() for kind, t in by_expert.items() for e in range(experts)}
    found["decisions"] = torch.tensor(float(len(gates)), device=gates.device)
    found["entropy"] = torch.special.entr(gates).sum()
    found |= {f"overconfidence/{b}": gap for b, gap in enumerate(overconfidence(gates, labels))}
    values = torch.stack([t.double() for t in found.values()]).tolist()
    return {SUM + name: value for name, value in (*zip(found, values, strict=True), *_slots(model).items())}


def _slots(model: AlignXForCausalLM) -> dict[str, float]:
    """Of the expert-parallel dispatch of all layers; none where experts are not dispatched."""
    dispatches = [m.dispatch for layer in alignx_layers(model) if isinstance(m := layer.mixture, ParallelMixture)]
    return {
        "slots": float(sum(d.slots for d in dispatches)),
        "empty slots": sum(d.slots * d.padding_fraction for d in dispatches),
    }


@dataclass(frozen=True)
class RouterCurves:
    """A scribe that writes figures of the router where it is given `router_sums`, averaged over the step.

    An axis without rows in the step has no figure there; what was not finite gives none at all.
    """

    experts: list[str]
    scribe: Scribe

    def __call__(self, step: int, values: dict[str, float]) -> None:
        sums = {name.removeprefix(SUM): value for name, value in values.items() if name.startswith(SUM)}
        others = {name: value for name, value in values.items() if not name.startswith(SUM)}
        self.scribe(step, others | self.figures(sums))

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        decisions = sums.get("decisions", 0.0)
        if not decisions or "entropy" not in sums:
            return {}
        found = {"router/entropy": sums["entropy"] / decisions}
        for e, name in enumerate(self.experts):
            found[f"router/gate/{name}"] = sums[f"gate/{e}"] / decisions
            found[f"router/share/{name}"] = sums[f"share/{e}"] / decisions
            if rows := sums[f"rows/{e}"]:
                found[f"router/own/{name}"] = sums[f"own/{e}"] / rows
        found["router/ece"] = math.fsum(abs(sums[f"overconfidence/{b}"]) for b in range(BINS)) / decisions
        if sums["slots"]:
            found["router/padding"] = sums["empty slots"] / sums["slots"]
        return found
