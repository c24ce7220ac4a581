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
from alignx_ds.runtime import distributed
from alignx_ds.study.studied_run import StudiedRun


def layer_outputs(
    model: PreTrainedModel, studied: StudiedRun, layers: list[int], examples: list[Example]
) -> Iterator[tuple[Batch, dict[int, Tensor]]]:
    """By batch of examples: the batch, and by layer its output [B, T, d] in the model's dtype."""
    inner = model.backbone if isinstance(model, AlignXForCausalLM) else model
    decoder, latest = studied.base.table.decoder_layers(inner), dict[int, Tensor]()
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(decoder[layer].register_forward_hook(partial(_keep, latest, layer)).remove)
        for start in range(0, len(examples), studied.batch):
            part = collate(examples[start : start + studied.batch], studied.pad_id).to(distributed.device())
            model(input_ids=part.input_ids, attention_mask=part.attention_mask, use_cache=False)
            yield part, latest


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returns: alone, or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _keep(latest: dict[int, Tensor], layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
    latest[layer] = hidden_of(output)
