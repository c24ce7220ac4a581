"""Problems of base models whose FFNs are mixtures of experts already: our experts change their attention alone."""

from __future__ import annotations

from collections.abc import Iterator

from alignx_ds.config.schema import ATTENTION_TARGETS, FFN_TARGETS, RunConfig
from alignx_ds.errors import Problem
from alignx_ds.models.base import BaseModel
from alignx_ds.plan.attention import FFNS_ALONE

TARGETS = f"train.lora.targets=[{', '.join(ATTENTION_TARGETS)}]"


def problems(c: RunConfig, base: BaseModel) -> Iterator[Problem]:
    """Of settings by which an expert would change such an FFN, or share it; none where the FFNs are dense."""
    if base.table.projections:
        return
    such = f"for a mixture of experts ({base.config.model_type})"
    if c.train.trainable != "lora":
        fix = f"set train.trainable=lora and {TARGETS}: the router and its experts stay as they are"
        yield Problem("train.trainable", c.train.trainable, f"lora, {such}", fix)
    elif any(target in FFN_TARGETS for target in c.train.lora.targets):
        fix = f"set {TARGETS}, or some of these: the router and its experts stay as they are"
        yield Problem("train.lora.targets", c.train.lora.targets, f"projections of the attention, {such}", fix)
    if c.align.ep_size:
        fix = "set align.ep_size=0: what our experts add to the attention is not spread over ranks"
        yield Problem("align.ep_size", c.align.ep_size, f"0 {such}", fix)
    if left_out := [name for name in FFNS_ALONE if name in c.baselines.make]:
        fix = f"leave out {', '.join(left_out)}: of a specialist they take the FFNs alone"
        yield Problem("baselines.make", c.baselines.make, f"other baselines {such}", fix)
