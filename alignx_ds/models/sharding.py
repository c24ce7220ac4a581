"""A trunk whose weights are spread over the ranks, for forward passes without gradients: torch's FSDP2.

Every rank keeps an equal part of the rows of each weight. A decoder layer is gathered right before it runs and freed
after it, so no rank ever holds the model, and all ranks have to make the same number of passes.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from alignx_ds.mocae.backbones import backbone_of
from alignx_ds.models import architecture
from alignx_ds.models.pretrained import INDEX
from alignx_ds.models.stored import Stored
from alignx_ds.runtime import distributed, memory

LARGEST = 2**29  # bytes of a file of weights
SHARE = 0.8  # of a rank's memory: a model whose weights take more is sharded


def is_too_large(size: int) -> bool:
    """Whether no rank should hold weights of so many bytes, where there are others to share them. Collective."""
    return distributed.world_size() > 1 and any(distributed.gather(size > SHARE * memory.available()))


def is_sharded(model: nn.Module) -> bool:
    """Whether forward passes of this model are collective, because its trunk is spread over the ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM whose weights are on the meta device, spread over the ranks already; `fill` gives them their values.

    Modules that take a place in it later are not spread.
    """
    from accelerate import init_empty_weights  # of the packages that training needs
    from torch.distributed.fsdp import fully_shard

    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    mark_initialised(model)
    model.requires_grad_(False).eval()
    mesh = init_device_mesh(distributed.device().type, (distributed.world_size(),))
    for layer in backbone_of(model.config.model_type).decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def mark_initialised(model: nn.Module) -> None:
    """Keep transformers from filling the weights with random numbers, when modules are added to the model."""
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


@torch.no_grad()
def fill(model: nn.Module, tensors: dict[str, Stored]) -> None:
    """Give a model its stored values by name: of a weight that is spread over the ranks, this rank's rows alone."""
    device, origins = distributed.device(), architecture.tied(model)
    state: dict[str, Tensor] = {}
    for name, there in model.state_dict().items():
        stored = tensors.get(name) or tensors.get(origins.get(name, ""))
        if stored is None:
            continue
        if isinstance(there, DTensor):
            own = stored.read_rows(*own_rows(there.shape[0])).to(device, there.dtype)
            how: Any = {"run_check": False, "shape": there.shape, "stride": there.stride()}
            state[name] = DTensor.from_local(own, there.device_mesh, [Shard(0)], **how)
        else:
            state[name] = stored.read().to(device, there.dtype, copy=True)  # or its whole file stays mapped
    model.load_state_dict(state, strict=False, assign=True)


def own_rows(rows: int) -> tuple[int, int]:
    """(first, one past the last) of this rank's part of a weight with so many rows, as torch.chunk cuts them."""
    size = -(-rows // distributed.world_size())
    first = min(rows, distributed.rank() * size)
    return first, min(rows, first + size)


@torch.no_grad()
def add(weight: Tensor, change: Tensor) -> None:
    """Add a whole change [m, n] to a weight, in place and in its dtype; of a weight that is spread, to the own rows."""
    if isinstance(weight, DTensor):
        first, last = own_rows(len(change))
        weight.to_local().add_(change[first:last].to(weight.device, weight.dtype))
    else:
        weight.add_(change.to(weight))


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor. Collective where it is spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save(model: PreTrainedModel, directory: Path) -> None:
    """What save_pretrained writes. Collective.

    Rank 0 holds the weights of one file at a time, and a reader maps one. So a file has at most LARGEST bytes, and at
    most an eighth of a rank's part of the model: no rank needs much more memory than its part takes.
    """
    state, tied = model.state_dict(), architecture.tied(model)
    sizes = {name: t.numel() * t.dtype.itemsize for name, t in state.items() if name not in tied}
    largest = min(LARGEST, sum(sizes.values()) // (8 * distributed.world_size()))
    files: list[list[str]] = [[]]
    size = 0
    for name, added in sizes.items():
        if files[-1] and size + added > largest:
            files.append([])
            size = 0
        files[-1].append(name)
        size += added
    distributed.on_main(partial(directory.mkdir, parents=True, exist_ok=True))
    index: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = whole(state[name]).detach()
            if distributed.is_main():
                tensors[name] = tensor.cpu().contiguous()
            index[name] = file
        distributed.on_main(partial(save_file, tensors, directory / file, {"format": "pt"}))
    distributed.on_main(partial(_save_rest, model, directory, index))


def _save_rest(model: PreTrainedModel, directory: Path, index: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
