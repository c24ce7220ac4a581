"""Problems of experts that change the attention's projections."""

from __future__ import annotations

from collections.abc import Iterator

from alignx_ds.config.schema import ATTENTION_TARGETS, FUSIONS, RESTORED, RunConfig
from alignx_ds.errors import ConfigError, Problem, UnreachableError
from alignx_ds.experts.adapters import Adapter
from alignx_ds.models.base import BaseModel

FFNS_ALONE = (*FUSIONS, RESTORED)  # baselines that take no more of a specialist


def changed_by(c: RunConfig, base: BaseModel) -> Iterator[tuple[str, str]]:
    """(key, value) of every setting by which an expert changes the attention. Adapters that can't be read have none."""
    if c.train.trainable == "lora" and (targets := [t for t in c.train.lora.targets if t in ATTENTION_TARGETS]):
        yield "train.lora.targets", ", ".join(targets)
    for name, axis in c.axes.items():
        if axis.adapter and not c.from_scratch:
            try:
                changes = Adapter(axis.adapter, f"axes.{name}.adapter").changes_attention(base)
            except (ConfigError, UnreachableError):
                continue
            if changes:
                yield f"axes.{name}.adapter", axis.adapter


def problems(c: RunConfig, base: BaseModel) -> Iterator[Problem]:
    """Of the settings around such experts."""
    for key, given in changed_by(c, base):
        if c.gate.scope != "shared":
            fix = "set gate.scope=shared: the gate of each layer decides after the attention of that layer"
            yield Problem(key, given, "projections of the FFN, with gate.scope=per_layer", fix)
        if len(base.layers) < 2:
            fix = "name a layer below, in which the gate decides; it decides after the attention of its own layer"
            yield Problem("model.layers", base.layers, f"two layers or more with {key}={given}", fix)
        if left_out := [name for name in FFNS_ALONE if name in c.baselines.make]:
            fix = f"leave out {', '.join(left_out)}: of a specialist they take the FFNs alone"
            yield Problem("baselines.make", c.baselines.make, f"other baselines with {key}={given}", fix)
