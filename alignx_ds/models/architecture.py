"""Whether the tensors of a checkpoint are those of the architecture that its config names, no more and no less.

Names are matched as transformers does when it loads them: some are renamed, and the prefix of the base model may be
there or not. What finds no place would be dropped, and what is not there would be filled with random numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations import deepspeed as sharding

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.models.pretrained import reading
from alignx_ds.models.stacked import Parts, is_stack, stacked
from alignx_ds.models.stored import Stored

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
LEARNING_ROUTER = {"output_router_logits": "false", "router_jitter_noise": "0.0"}
LAYERS = 2000  # more than any model has; with millions of them, building the modules would take hours
RECOMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(^|\.)masked_bias$")  # buffers of old checkpoints
COMPILED, WRAPPED, NESTED = "_orig_mod.", "module.", "base_model.model."
PREFIXES = {
    COMPILED: "it was saved from a compiled model",
    WRAPPED: "it was saved from within a data-parallel wrapper",
    NESTED: "it was saved from within a PEFT model; merge the adapter and save the model",
}
SHOWN = 3  # names in a message


@dataclass
class Match:
    """What a checkpoint's tensors are to an architecture."""

    placed: dict[str, Stored] = field(default_factory=dict)  # by the parameter's name; tied ones once or twice
    missing: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    misshapen: dict[str, tuple[int, ...]] = field(default_factory=dict)  # with the shape that it should have
    no_floats: dict[str, str] = field(default_factory=dict)  # with their dtype


def value_problem(config: PreTrainedConfig, key: str, given: str) -> Problem | None:
    """Sizes and rates with which no module can be built or trained, whatever the architecture."""
    for name in SIZES:
        value = getattr(config, name, None)
        most = LAYERS if name == "num_hidden_layers" else None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
            allowed = f"a model whose {name} is at least 1{f' and at most {most}' if most else ''}"
            return Problem(key, given, allowed, f"its config.json has {value!r}; correct it")
    for name, off in LEARNING_ROUTER.items():
        if getattr(config, name, None):
            fix = f"set it to {off} in its config.json: it is for a router that learns, which it does not here"
            return Problem(key, given, f"a model whose {name} is {off}", fix)
    picked, there = getattr(config, "num_experts_per_tok", None), getattr(config, "num_experts", None)
    if isinstance(picked, int) and isinstance(there, int) and not 1 <= picked <= there:
        fix = f"its config.json has {picked} of {there}; correct it"
        return Problem(key, given, "a model whose num_experts_per_tok is from 1 to its number of experts", fix)
    if getattr(config, "use_bidirectional_attention", None):
        fix = "its config.json has use_bidirectional_attention, as embedding models do; give a model that generates"
        return Problem(key, given, "a model with causal attention", fix)
    for name, value in vars(config).items():
        if "dropout" in name and isinstance(value, (int, float)) and not 0 <= value <= 1:
            return Problem(
                key, given, f"a model whose {name} is from 0 to 1", f"its config.json has {value!r}; correct it"
            )
    return None


def skeleton(config: PreTrainedConfig, key: str, given: str) -> PreTrainedModel:
    """The modules without memory for their weights.

    Raises ConfigError where the config's values do not allow them, or a step of training or decoding with them.
    """
    with reading(key, given, "config.json"), _unsharded(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        if caps_attention(config) and model._supports_sdpa:  # its default, which would leave the cap out
            fix = f"transformers {transformers.__version__} leaves out its attn_logit_softcapping; install a newer one"
            raise ConfigError(Problem(key, given, "a model that this transformers computes as it was trained", fix))
        for training in (True, False):
            _rehearse(model.train(training))
    return model


def caps_attention(config: PreTrainedConfig) -> bool:
    """Whether attention's scores are capped, as in Gemma 2, which SDPA can't do."""
    return getattr(config, "attn_logit_softcapping", None) is not None


@contextmanager
def _unsharded() -> Iterator[None]:
    """Within it transformers does not shard what it builds, though an HfDeepSpeedConfig with ZeRO-3 is alive."""
    alive = sharding._hf_deepspeed_config_weak_ref
    sharding.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        sharding._hf_deepspeed_config_weak_ref = alive


@torch.no_grad()
def _rehearse(model: PreTrainedModel) -> None:
    """A forward pass in which no number is computed, because the tensors have shapes alone."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    try:
        shape = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=not model.training).logits.shape
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return  # an architecture that looks at the values of its tensors
    if tuple(shape[:2]) != (1, 2):
        raise ValueError(f"2 tokens give logits of {list(shape)}")


def match(model: PreTrainedModel, tensors: Iterable[Stored]) -> Match:
    """Find the place of every tensor. `model` may be a skeleton."""
    state, found = model.state_dict(), Match()
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    made: dict[str, Parts] = defaultdict(lambda: defaultdict(list))  # out of several stored tensors, or parts of one
    for tensor in tensors:
        name, source = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, state)
        if name not in state and tensor.name in state:
            name, source = tensor.name, None
        if name not in state:
            found.dropped.append(tensor.name)
            continue
        if source is not None:
            made[name][source].append(tensor)
        else:
            found.placed[name] = tensor
        if tensor.dtype not in FLOATS and state[name].is_floating_point():
            found.no_floats[tensor.name] = tensor.dtype
    found.placed |= _stacks(made, converters, state)
    for name, placed in found.placed.items():
        if placed.shape != tuple(state[name].shape):
            found.misshapen[name] = tuple(state[name].shape)
    there = {*found.placed, *made}
    for target, origin in tied(model).items():
        there |= {target, origin} if target in there or origin in there else {target}
        if target in found.placed:  # the only one of both that is stored, or stored twice
            found.placed.setdefault(origin, found.placed[target])
    found.missing = [] if made else _kept(model, "missing", (name for name in state if name not in there))
    found.dropped = _kept(model, "unexpected", found.dropped)
    return found


def _stacks(made: dict[str, Parts], converters: list[WeightConverter], state: dict[str, Tensor]) -> dict[str, Stored]:
    """The whole stacks of experts' weights among what is made of several tensors, from which all stacks are removed."""
    of_source = {source: converter for converter in converters for source in converter.source_patterns}
    found: dict[str, Stored] = {}
    for name in [name for name, parts in made.items() if all(is_stack(of_source[source]) for source in parts)]:
        parts = made.pop(name)
        if whole := stacked(of_source[next(iter(parts))], parts, state[name].shape):
            found[name] = whole
    return found


def tied(model: PreTrainedModel) -> dict[str, str]:
    """Names of parameters that are another parameter, with that one's name."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _kept(model: Any, kind: str, names: Iterable[str]) -> list[str]:
    """The names that the architecture does not ignore."""
    patterns = [*(getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ())]
    ignored = [*patterns, *(RECOMPUTED if kind == "unexpected" else ())]
    return [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]


def checkpoint_problem(model: PreTrainedModel, found: Match, key: str, given: str) -> Problem | None:
    """The one line that says what is wrong with a checkpoint, and what to do about it."""
    allowed = f"the weights of a {type(model).__name__}"
    empty = [name for name in found.misshapen if 0 in found.placed[name].shape]
    if prefix := _prefix(found):
        fix = (
            f"the names of its weights begin with {prefix!r}: {PREFIXES.get(prefix, 'they are part of another model')}"
        )
        return Problem(key, given, allowed, f"{fix}; remove the prefix and save it again")
    if empty:
        fix = "the shards of ZeRO-3 were not gathered before it was saved; convert its checkpoint with zero_to_fp32.py"
        return Problem(key, given, allowed, f"{_listed(empty)} hold no values: {fix}")
    if found.missing:
        fix = "they would be random numbers; give a whole checkpoint"
        if found.missing == [output_head(model)]:
            fix = "its head would be random numbers; if it is tied, set tie_word_embeddings to true in its config.json"
        return Problem(key, given, allowed, f"it lacks {_listed(found.missing)}; {fix}")
    if found.misshapen:
        name, wanted = next(iter(found.misshapen.items()))
        others = f", like {len(found.misshapen) - 1} more" if len(found.misshapen) > 1 else ""
        fix = f"its {name} is {list(found.placed[name].shape)}, not {list(wanted)} as its config.json says{others}"
        return Problem(key, given, allowed, f"{fix}; correct one of the two")
    if found.no_floats:
        name, dtype = next(iter(found.no_floats.items()))
        fix = f"its {name} is of type {dtype}, as in a quantised model; give the model that it was made from"
        return Problem(key, given, allowed, fix)
    if found.dropped:
        fix = "which its config.json has no place for, and which would be dropped; correct its config.json"
        return Problem(key, given, allowed, f"it holds {_listed(found.dropped)}, {fix}")
    return None


def output_head(model: PreTrainedModel) -> str:
    """The name of the output head's weight."""
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), "")


def _prefix(found: Match) -> str:
    """What the stored name of every missing tensor begins with; empty where they are not there under such a name."""
    dropped = set(found.dropped)
    for name in found.missing[:1]:
        for other in found.dropped:
            prefix = other.removesuffix(name)
            if prefix != other and all(f"{prefix}{n}" in dropped for n in found.missing):
                return prefix
    return ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
