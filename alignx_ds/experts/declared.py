"""What an adapter's config file says of itself, against the base model and against the adapter's own tensors.

Shapes: lora_A [r, n], lora_B [m, r]. Modules are named as in the base model, e.g. `model.layers.3.mlp.up_proj`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignx_ds.config.schema import WORLD_MODELS, ModelConfig
from alignx_ds.errors import ConfigError
from alignx_ds.mocae.experts import ATTENTION
from alignx_ds.models.base import WORLD_BASES, BaseModel

Settings = Mapping[str, Any]
CACHED = re.compile(r"models--[^/]+--(?P<name>[^/]+)/snapshots/")  # a path in the hub's cache
RANK, ALPHA = 8, 8  # PEFT's defaults


def other_base(config: Settings, base: BaseModel) -> str:
    """The base model that the adapter names, where that is another than this one; else empty.

    Names are compared without their owner or folder, since models are copied and mirrored. Of two directories on this
    machine, a weight of each is compared too.
    """
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip():
        return ""
    if os.path.isdir(named) and (same := _same_weights(named, base)) is not None:
        return "" if same else named
    own = {_tail(base.settings.path), _tail(os.path.realpath(base.path))}
    if isinstance(copied := base.written("_name_or_path"), str) and copied:
        own.add(_tail(copied))
    if (given := base.settings.path) in WORLD_MODELS:
        own |= {given, WORLD_BASES[given].name}
    return "" if _tail(named) in own else named


def _tail(name: str) -> str:
    cached = CACHED.search(name)
    return (cached["name"] if cached else Path(name.strip()).name).lower()


def _same_weights(directory: str, base: BaseModel) -> bool | None:
    """Whether a model's lowest AlignX layer is the base's; None where one of them can't be read."""
    if os.path.realpath(directory) == os.path.realpath(base.path):
        return True
    try:
        if not base.has_weights:
            return None
        other = BaseModel(ModelConfig(path=directory, layers=base.layers))
        if not other.has_weights:
            return None
        first = base.layers[0]
        pairs = [(base.weight(first, p), other.weight(first, p)) for p in base.table.projections or ATTENTION]
    except ConfigError:
        return None
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def contradictions(config: Settings, ranks: Mapping[str, int], base: BaseModel) -> Iterator[str]:
    """Where the file's modules and their ranks are not those that the config declares; each as a sentence."""
    modules = {name: m for name, m in base.skeleton.named_modules() if isinstance(m, nn.Linear)}
    targets = config.get("target_modules")
    if isinstance(targets, list):
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                yield f"its target_modules name {target!r}, and the base model has no such module"
                return
    lacking = [name for name in modules if name not in ranks and _targeted(config, name, base)]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        yield f"it has no factors of {lacking[0]}{more}, which its target_modules name: a part of it is missing"
    beyond = [name for name in ranks if targets is not None and not _targeted(config, name, base)]
    if beyond:
        yield f"it has factors of {beyond[0]}, which its config does not name, so PEFT would not use them"
    for module, rank in ranks.items():
        declared = pattern_value(config.get("rank_pattern"), module, config.get("r", RANK))
        if declared != rank:
            yield f"the factors of {module} have rank {rank}, its config says {declared}: its scale is not known"
            return


def _targeted(config: Settings, module: str, base: BaseModel) -> bool:
    """As PEFT decides which modules get an adapter."""
    targets, chosen = config.get("target_modules"), config.get("layers_to_transform")
    if _named(config.get("exclude_modules"), module) or (head := base.skeleton.get_output_embeddings()) is None:
        return False
    if targets == "all-linear":
        return base.skeleton.get_submodule(module) is not head
    if not _named(targets, module):
        return False
    if isinstance(targets, str) or chosen is None or chosen == []:
        return True
    layer = re.search(r"\.(\d+)\.", module)
    return layer is not None and int(layer[1]) in ([chosen] if isinstance(chosen, int) else chosen)


def _named(names: Any, module: str) -> bool:
    """By a pattern, or by a list of names or of their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def pattern_value(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's `rank_pattern` and `alpha_pattern`: the value of the first pattern that the module's name ends with."""
    matching = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matching, default)
