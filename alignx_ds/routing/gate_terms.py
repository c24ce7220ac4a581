"""The terms of a model's gates on a set of prompts, computed by all ranks together.

Shapes: N prompts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from alignx_ds.data.batches import collate
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.mocae.gate import CalibratedGate, Decision, Query
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.runtime import distributed


def gate_terms(
    model: AlignXForCausalLM, rows: LabelledExamples, pad_id: int, batch: int
) -> dict[int, dict[str, Tensor]]:
    """By the gate's layer and the term's name, [N, E] fp32 in the order of the rows, before the post-hoc temperature.

    Computed from the prompts alone, as in generation. Collective; every rank returns the terms of all rows.
    """
    names = next(iter(gates_of(model).values())).terms

    def terms(gate: CalibratedGate, query: Query) -> Tensor:
        parts = gate.parts(query)
        return torch.stack([parts[name] for name in names], dim=1)

    found = on_prompts(model, rows, pad_id, batch, terms)
    return {i: dict(zip(names, stacked.unbind(1), strict=True)) for i, stacked in found.items()}


@torch.no_grad()
def on_prompts(
    model: AlignXForCausalLM,
    rows: LabelledExamples,
    pad_id: int,
    batch: int,
    read: Callable[[CalibratedGate, Query], Tensor],
    forced: Tensor | None = None,
) -> dict[int, Tensor]:
    """By the gate's layer, [N, ...] in the order of the rows: what `read` makes of a batch of queries, row by row.

    The rows' prompts run alone, as in generation, with these forced gates [N, E] or as the gates decide. Collective;
    every rank returns what all ranks read.
    """
    model.eval()
    device, gates = distributed.device(), gates_of(model)
    queries: dict[int, Query] = {}
    hooks = [gate.register_forward_hook(_keep(queries, i, last=i == max(gates))) for i, gate in gates.items()]
    own = distributed.rank_share(list(range(len(rows.examples))))
    own.sort(key=lambda i: rows.examples[i].prompt_length)  # little padding
    made: dict[int, dict[int, Tensor]] = {index: {} for index in gates}  # by row
    for chosen, wanted in distributed.lockstep(own, batch, len(rows.examples), 0):
        prompts = [rows.examples[i] for i in chosen]
        part = collate([replace(e, ids=e.ids[: e.prompt_length]) for e in prompts], pad_id)
        used = None if forced is None else forced[chosen].to(device)
        with suppress(_AllAsked):
            model(part.input_ids.to(device), part.attention_mask.to(device), forced=used, use_cache=False)
        for index, gate in gates.items() if wanted else ():
            made[index].update(zip(chosen, read(gate, queries[index]).cpu(), strict=True))
    for hook in hooks:
        hook.remove()
    shares = distributed.gather(made)
    found = {i: {row: tensor for share in shares for row, tensor in share[i].items()} for i in gates}
    return {i: torch.stack([by_row[row] for row in range(len(rows.examples))]) for i, by_row in found.items()}


class _AllAsked(Exception):  # noqa: N818
    """Ends a forward pass at the highest gate: what is above it would be computed for nothing."""


def _keep(queries: dict[int, Query], index: int, *, last: bool) -> Callable[[nn.Module, tuple[Query], Decision], None]:
    def hook(gate: nn.Module, inputs: tuple[Query], output: Decision) -> None:
        (queries[index],) = inputs
        if last:
            raise _AllAsked

    return hook


def sum_of(terms: dict[str, Tensor], *names: str) -> Tensor:
    """The sum [N, E] of the named terms, or of all: the gate's logits before the post-hoc temperature."""
    return torch.stack([terms[name] for name in names or terms]).sum(0)
