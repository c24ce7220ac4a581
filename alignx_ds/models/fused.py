"""Checkpoints that hold several projections in one weight, read as the architecture that has a weight for each.

Nothing is written: the config is translated, and a projection's weight is some rows of a stored tensor. So it can be
trained, sharded and changed by itself, which a part of a parameter can't. FUSED (mocae/backbones.py) has the names.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.mocae.backbones import Backbone, backbone_of
from alignx_ds.models.stored import Stored


@dataclass(frozen=True)
class Rows(Stored):
    """Some rows of a stored tensor, `whole`; `name` is the projection's, not the file's."""

    whole: Stored
    first: int

    def read(self) -> Tensor:
        return self.read_rows(0, self.shape[0])

    def read_rows(self, first: int, last: int) -> Tensor:
        return self.whole.read_rows(self.first + first, self.first + last)


def separate_config(config: PreTrainedConfig, fused: Backbone, key: str, given: str) -> PreTrainedConfig:
    """The config of the architecture with separate weights. Raises ConfigError where its positions differ."""
    rope = config.rope_parameters
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind != "default" or share != 1:
        has = f"rope_type {kind}" if kind != "default" else f"partial_rotary_factor {share}"
        fix = f"its config.json has {has}, which {fused.same_as} can't compute; choose another model"
        allowed = f"a {config.model_type} model with plain rotary positions, as Phi-3-mini-4k and Phi-4 have"
        raise ConfigError(Problem(key, given, allowed, fix))
    known = AutoConfig.for_model(fused.same_as).to_dict().keys() - {"model_type", "architectures"}
    values = {name: value for name, value in config.to_dict().items() if name in known}
    return AutoConfig.for_model(fused.same_as, **values | {"rope_parameters": {"rope_theta": rope["rope_theta"]}})


def separate(tensors: dict[str, Stored], fused: Backbone, skeleton: nn.Module) -> dict[str, Stored]:
    """The tensors with every fused weight as its projections' rows; `skeleton` has the separate projections.

    Where a weight has not as many rows as they have together, theirs are too few or too many as well.
    """
    table, found = backbone_of(fused.same_as), dict[str, Stored]()
    for name, whole in tensors.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        parts = fused.sharing(module)
        if len(parts) < 2 or not whole.shape:
            found[name] = whole
            continue
        counts = [table.linear(skeleton, 0, part).out_features for part in parts]
        for number, part in enumerate(parts):
            first, last = (whole.shape[0] * sum(counts[:end]) // sum(counts) for end in (number, number + 1))
            own = name.replace(f"{module}.weight", f"{getattr(table, part)}.weight")
            found[own] = Rows(whole.file, own, (last - first, *whole.shape[1:]), whole.dtype, whole, first)
    return found
