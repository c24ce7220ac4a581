"""One pass over an axis's rows with its specialist: from the FFNs' inputs to the expert's factors.

Every rank runs the same rows (ZeRO-3 keeps the ranks in step) and listens at its own layers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alignx_ds.data.batches import Batch, collate
from alignx_ds.data.encode import Example
from alignx_ds.experts.low_rank import LowRank, TaskFeatures
from alignx_ds.experts.task_vectors import Changes
from alignx_ds.mocae.backbones import Backbone
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.runtime import distributed


@torch.no_grad()
def expert_factors(
    model: nn.Module,
    table: Backbone,
    changes: dict[int, Changes],
    examples: list[Example],
    pad_id: int,
    rank: int,
    batch: int = 32,
) -> dict[int, dict[str, LowRank]]:
    """By owned layer and projection. `changes` holds the owned layers' task vectors; features are those of all tokens
    of the row, prompt and answer, because an expert serves both. Collective under ZeRO-3."""
    device = distributed.device()
    collected = {
        layer: {p: TaskFeatures(c.to(device)) for p, c in by_name.items()} for layer, by_name in changes.items()
    }
    seen: dict[str, Tensor] = {}
    hooks: list[RemovableHandle] = []
    for layer, by_projection in collected.items():
        view = table.view(table.ffn_of(model, layer))
        for p in PROJECTIONS:
            hooks.append(view.projection(p).register_forward_pre_hook(_listener(by_projection[p], seen)))
    model.eval()
    for start in range(0, len(examples), batch):
        part: Batch = collate(examples[start : start + batch], pad_id)
        seen["mask"] = part.attention_mask.to(device).bool()
        model(input_ids=part.input_ids.to(device), attention_mask=part.attention_mask.to(device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {layer: {p: f.factor(rank) for p, f in by_name.items()} for layer, by_name in collected.items()}


def _listener(features: TaskFeatures, seen: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def listen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        features.add(inputs[0][seen["mask"]].float())

    return listen
