"""The terms of a model's gates on a set of prompts, computed by all ranks together.

Shapes: N prompts, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from alignx_ds.data.batches import collate
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.runtime import distributed


@torch.no_grad()
def gate_terms(
    model: AlignXForCausalLM, rows: LabelledExamples, pad_id: int, batch: int
) -> dict[int, dict[str, Tensor]]:
    """By the gate's layer and the term's name, [N, E] fp32 in the order of the rows, before the post-hoc temperature.

    Computed from the prompts alone, as in generation. Collective; every rank returns the terms of all rows.
    """
    model.eval()
    device, gates = distributed.device(), gates_of(model)
    own = distributed.rank_share(list(range(len(rows.examples))))
    made: dict[int, list[Tensor]] = {index: [] for index in gates}
    names = next(iter(gates.values())).terms
    for start in range(0, len(own), batch):
        prompts = [rows.examples[i] for i in own[start : start + batch]]
        part = collate([replace(e, ids=e.ids[: e.prompt_length]) for e in prompts], pad_id)
        model(part.input_ids.to(device), part.attention_mask.to(device), use_cache=False)
        for index, gate in gates.items():
            terms = gate.parts(model.routing.queries[index])
            made[index] += list(torch.stack([terms[t] for t in names], dim=1).cpu())  # a row's terms, each [E]
    shares = distributed.gather(made)
    stacked = {i: torch.stack(distributed.interleave([share[i] for share in shares])) for i in gates}
    return {i: dict(zip(names, s.unbind(1), strict=True)) for i, s in stacked.items()}


def sum_of(terms: dict[str, Tensor], *names: str) -> Tensor:
    """The sum [N, E] of the named terms, or of all: the gate's logits before the post-hoc temperature."""
    return torch.stack([terms[name] for name in names or terms]).sum(0)
