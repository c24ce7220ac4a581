"""What a fine-tune of all weights changes beside the FFNs of the AlignX layers, which no expert can hold.

Its directory keeps this, because it is compared as the whole model that it is, and a sequential fine-tune goes on from
it. It is streamed like the task vectors, and the ranks share its files: one for each decoder layer, and one for the
embedding, the last norm and the head.
"""

from __future__ import annotations

import re
from collections import defaultdict
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignx_ds.models.base import BaseModel
from alignx_ds.models.sharding import add
from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed


def write_beside(model: nn.Module, base: BaseModel, directory: Path) -> tuple[int, float]:
    """Write the changes, fp32, into the directory. Returns (how many numbers they are, their L2 norm). Collective.

    `model` is stage 1's, within its DeepSpeed engine, whose fp32 master weights are compared with the base's weights.
    """
    numbers, squares = 0, 0.0
    for position, (file, parameters) in enumerate(_beside(model, base).items()):
        changes: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            trained = load_deepspeed().utils.safe_get_full_fp32_param(parameter)  # whole, on every rank
            assert trained is not None, "every weight of the model is trained"
            if position % distributed.world_size() == distributed.rank():
                changes[name] = trained.float().cpu() - base.start(name)
            del trained
        if changes:
            save_file(changes, directory / file)
        numbers += sum(change.numel() for change in changes.values())
        squares += sum(float(change.double().square().sum()) for change in changes.values())
    of_ranks = distributed.gather((numbers, squares))
    return sum(own for own, _ in of_ranks), sqrt(sum(own for _, own in of_ranks))


@torch.no_grad()
def add_beside(model: nn.Module, base: BaseModel, directory: Path) -> None:
    """Add these changes to a base model in place; none where only FFNs were trained. Collective if it is sharded."""
    for file, parameters in _beside(model, base).items():
        if not (directory / file).is_file():
            continue
        with load_deepspeed().zero.GatheredParameters(list(parameters.values()), modifier_rank=0):
            sharded = any(hasattr(parameter, "ds_id") for parameter in parameters.values())
            if not sharded or distributed.is_main():
                for name, change in load_file(directory / file).items():
                    add(parameters[name], change)


def _beside(model: nn.Module, base: BaseModel) -> dict[str, dict[str, nn.Parameter]]:
    """By the name of their file and their own, all parameters but the FFN weights of the AlignX layers."""
    ffns = {base.table.weight_name(layer, p) for layer in base.layers for p in base.table.projections}
    of_layer = re.compile(rf"{re.escape(base.table.layers)}\.(\d+)\.")
    found: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if name not in ffns:
            layer = of_layer.match(name)
            file = f"beside_{int(layer[1]):03d}.safetensors" if layer else "beside_layers.safetensors"
            found[file][name] = parameter
    return dict(found)
