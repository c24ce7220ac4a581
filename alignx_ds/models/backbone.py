"""Loads models with their weights: any causal LM, a run's base model, an aligned model. Nothing else loads weights.

All of them are read from safetensors, and no code of a model directory is run (models/pretrained.py).
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.integrations import deepspeed as zero_integration
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state

from alignx_ds.config.bounds import violations
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXConfig, AlignXForCausalLM
from alignx_ds.mocae.settings import GateSettings
from alignx_ds.models import sharding
from alignx_ds.models.architecture import checkpoint_problem, match
from alignx_ds.models.base import KEY, BaseModel
from alignx_ds.models.ends import answering_tokenizer, vocabulary_of
from alignx_ds.models.pretrained import MODEL, NO_CODE, NO_PICKLE, model_type, reading
from alignx_ds.models.registration import MODEL_TYPE
from alignx_ds.models.stored import not_finite, read_headers, weight_files
from alignx_ds.models.tokenizer import vocabulary_problem
from alignx_ds.runtime import attention, distributed
from alignx_ds.runtime.deepspeed import load_deepspeed

# Before 5.21 transformers has none, and builds rotary frequencies under ZeRO-3 in the weights' dtype, itself too.
KEEP_ARANGE = getattr(zero_integration, "prevent_arange_dtype_change", nullcontext)
ALIGNED = "an aligned model that this version can read"
ALIGN_AGAIN = "run `alignx-ds align` again"


def load_causal_lm(directory: Path, key: str, given: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal LM of any architecture that transformers can load; "auto" is the dtype it was saved in, on the CPU.

    Raises ConfigError for the key where the directory holds no such model, or only a part of one.
    """
    attention.avoid_planning()
    with reading(key, given, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, **NO_PICKLE
        )
    return _whole(model, info, key, given)


def _separated(base: BaseModel) -> PreTrainedModel:
    """The whole model, of weights that its files hold in one with others (models/fused.py), on the CPU."""
    with reading(KEY, base.settings.path, "model"):
        given: Any = {"config": base.config, "state_dict": {name: t.read() for name, t in base.tensors.items()}}
        model, info = type(base.skeleton).from_pretrained(
            None, **given, dtype=base.dtype, output_loading_info=True, **NO_PICKLE
        )
    return _whole(model, info, KEY, base.settings.path)


def _whole(model: PreTrainedModel, info: dict[str, Any], key: str, given: str) -> PreTrainedModel:
    """The model, if nothing of it is random or no number. Raises ConfigError."""
    if missing := sorted(info["missing_keys"]):
        fix = f"it lacks {missing[0]}, which would be random numbers; give a whole checkpoint"
        raise ConfigError(Problem(key, given, MODEL, fix))
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not torch.isfinite(buffer).all():  # the positions' frequencies
            fix = f"its config.json makes {name} NaN or infinite; correct its rope_parameters"
            raise ConfigError(Problem(key, given, MODEL, fix))
    return model


def load_answering(directory: Path, key: str, given: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM or an aligned model that is to answer, and its tokenizer. Raises ConfigError for the key."""
    kind = model_type(directory, key, given)
    if damaged := not_finite(read_headers(weight_files(directory), key, given).values()):
        fix = f"its {damaged.name} holds NaN or infinite values: it is damaged; give another"
        raise ConfigError(Problem(key, given, "a model whose weights are numbers", fix))
    model = load_aligned(directory) if kind == MODEL_TYPE else load_causal_lm(directory, key, given)
    tokenizer = answering_tokenizer(directory, key, given)  # after the model, whose config it reads too
    if problem := vocabulary_problem(tokenizer, vocabulary_of(model.config), key, given):
        raise ConfigError(problem)
    return model, tokenizer


def load_backbone(base: BaseModel) -> PreTrainedModel:
    """The base model with its weights in the run's dtype; where an HfDeepSpeedConfig is alive, sharded by ZeRO-3.

    Elsewhere it is sharded for forward passes alone if it is too large for a rank's memory (models/sharding.py). Raises
    ConfigError where a weight is not finite. Collective: each rank looks at a part of them.
    """
    base.check_finite()
    large = sharding.is_too_large(base.size)
    if not large and not base.fused:
        return load_causal_lm(base.path, KEY, base.settings.path, base.dtype)
    attention.avoid_planning()
    if is_deepspeed_zero3_enabled():
        model = _partitioned(base)
    elif not large:
        model = _separated(base)
    else:
        model = sharding.skeleton(base.config, base.dtype)
        sharding.fill(model, base.tensors)
    model.generation_config = base.generation_config
    return model


@torch.no_grad()
def _partitioned(base: BaseModel) -> PreTrainedModel:
    """Sharded by ZeRO-3 weight by weight: from_pretrained would hold all of them on rank 0."""
    zero = load_deepspeed().zero
    # As from_pretrained builds it. from_config by itself would draw random weights, and gather each for that.
    sharded = zero.Init(config_dict_or_path=deepspeed_config())
    with no_init_weights(), KEEP_ARANGE(), sharded, set_zero3_state():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(base.config, dtype=base.dtype)
    model.tie_weights()
    sharding.mark_initialised(model)
    parameters = dict(model.named_parameters())
    for name, stored in base.tensors.items():
        if name not in parameters:  # it is tied to another, and read with that
            continue
        with zero.GatheredParameters([parameters[name]], modifier_rank=0):
            if distributed.is_main():
                parameters[name].copy_(stored.read())
    return model


def load_aligned(directory: Path, dtype: torch.dtype | str = "auto") -> AlignXForCausalLM:
    """An aligned model, all experts in this process (the fused path); "auto" is the dtype it was saved in.

    In a given dtype its trunk is sharded where it is too large for a rank's memory, and the call is collective. Raises
    ConfigError when its files can't be read, or don't hold every weight of today's modules.
    """
    return _load(directory, dtype, AlignXForCausalLM)


class LowerLayers(AlignXForCausalLM):
    """An aligned model up to the gate of its lowest AlignX layer; that layer's FFN and all above are not read.

    Its logits mean nothing.
    """

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["."]

    def __init__(self, config: AlignXConfig, **parts: Any) -> None:
        super().__init__(_cut(config), **parts)
        (layer,) = alignx_layers(self)
        layer.ffn, layer.calibration = nn.Identity(), None
        layer.add_module("mixture", _NoMixture())


class _NoMixture(nn.Module):
    """In place of a mixture whose output nobody needs."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """x as it is."""
        return x


def load_gate(directory: Path) -> LowerLayers:
    """The shared gate of an aligned model, with all that it needs. Raises ConfigError as `load_aligned` does."""
    made = _load(directory, "auto", LowerLayers)
    assert isinstance(made, LowerLayers)
    return made


def _load(directory: Path, dtype: torch.dtype | str, kind: type[AlignXForCausalLM]) -> AlignXForCausalLM:
    given = str(directory)
    attention.avoid_planning()
    with reading("model", given, "config.json", ALIGNED, f"another version wrote it; {ALIGN_AGAIN}"):
        config = AlignXConfig.from_pretrained(directory, **NO_CODE)
        _check_settings(config.gate_settings())
        with torch.device("meta"):
            skeleton = kind(config)
    found = match(skeleton, read_headers(weight_files(directory), "model", given).values())
    if problem := checkpoint_problem(skeleton, found, "model", given):
        fix = f"{problem.fix}; where another version wrote it, {ALIGN_AGAIN}"
        raise ConfigError(Problem("model", given, ALIGNED, fix))
    if damaged := not_finite(found.placed.values()):
        fix = f"its {damaged.name} holds NaN or infinite values: it is damaged; {ALIGN_AGAIN}"
        raise ConfigError(Problem("model", given, ALIGNED, fix))
    if isinstance(dtype, torch.dtype):
        size = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
        if sharding.is_too_large(size):
            made = kind(config, backbone=sharding.skeleton(config.text_config, dtype))
            sharding.fill(made, found.placed)
            return made
    with reading("model", given, "weights", ALIGNED, ALIGN_AGAIN):
        model: AlignXForCausalLM = kind.from_pretrained(directory, dtype=dtype, **NO_PICKLE)
    return model


def _cut(config: AlignXConfig) -> AlignXConfig:
    """A copy of a config without the layers above the lowest AlignX layer."""
    made = copy.deepcopy(config)
    text, count = made.text_config, made.layers[0] + 1
    made.layers, text.num_hidden_layers = made.layers[:1], count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return made


def _check_settings(gate: GateSettings) -> None:
    """Raises TypeError or ValueError for a value that a recipe could not have set."""
    for name, kind in get_type_hints(GateSettings).items():
        value, wanted = getattr(gate, name), get_origin(kind) or kind
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise TypeError(f"gate.{name} is {value!r}")
    for problem in violations(gate, {}, "gate."):
        raise ValueError(str(problem))
