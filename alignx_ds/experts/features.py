"""One pass over an axis's rows with its specialist: from the inputs of its FFN projections to the expert's factors.

Every rank runs the same rows, because ZeRO-3 needs all ranks in every layer, and collects at its own layers only.
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
    """The low-rank factors of an axis's expert, by this rank's layers and projection (low_rank.py, in fp64).

    `changes` holds the task vectors [m, n] of this rank's layers; `rank` 0 keeps full rank. The features are those of
    all tokens of a row, prompt and answer, because an expert serves both. Collective if ZeRO-3 has sharded the model.
    """
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
