"""The hidden states that decoder layers hand on, of many prompts.

Shapes: B prompts, T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from alignx_ds.data.batches import Batch, collate
from alignx_ds.data.encode import Example
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.decoder_outputs import hidden_of
from alignx_ds.runtime import distributed
from alignx_ds.study.studied_run import StudiedRun


def decoder_layers(model: PreTrainedModel, studied: StudiedRun) -> nn.ModuleList:
    """All decoder layers of one of the run's systems, lowest first."""
    return studied.base.table.decoder_layers(model.backbone if isinstance(model, AlignXForCausalLM) else model)


def layer_outputs(
    model: PreTrainedModel, studied: StudiedRun, layers: list[int], examples: list[Example]
) -> Iterator[tuple[Batch, dict[int, Tensor]]]:
    """By batch of examples: the batch, and by layer its output [B, T, d] in the model's dtype."""
    decoder, latest = decoder_layers(model, studied), dict[int, Tensor]()
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(decoder[layer].register_forward_hook(partial(_keep, latest, layer)).remove)
        for start in range(0, len(examples), studied.batch):
            part = collate(examples[start : start + studied.batch], studied.pad_id).to(distributed.device())
            model(input_ids=part.input_ids, attention_mask=part.attention_mask, use_cache=False)
            yield part, latest


def _keep(latest: dict[int, Tensor], layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
    latest[layer] = hidden_of(output)
