"""Activation checkpointing: how much the activations of a stage's micro batch take, and layers that recompute theirs.

A layer that recomputes keeps its input alone, and runs for a second time in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from alignx_ds.baselines.fusion import H3FUSION
from alignx_ds.config.schema import OptimizerConfig, RunConfig
from alignx_ds.mocae import recomputation
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.base import BaseModel

MOST = 8 * 2**30  # bytes on a rank: `auto` recomputes where the activations would take more
PACKED = ("train", "scratch.train")  # stages whose micro batches hold several rows in a line
FP32 = 4  # bytes of a number


@dataclass(frozen=True)
class Activations:
    """An estimate of what the decoder layers keep of one micro batch for the backward pass, in bytes of one rank.

    That is what torch saves for SDPA attention, RMSNorms and gated FFNs: 162 kB per token and layer at LLaMA-2-7B's
    shape in bf16. Layers below the lowest one that is trained keep nothing. The logits are not part of it.
    """

    kept: float
    recomputed: float  # where the layers recompute: their inputs, and all that one layer keeps

    @classmethod
    def estimate(cls, shape: PreTrainedConfig, size: int, first: int, tokens: int, experts: int) -> Activations:
        """Of a model in a dtype of `size` bytes, trained from layer `first` on; `experts` compute each token there."""
        d, layers = shape.hidden_size, shape.num_hidden_layers - first
        width = getattr(shape, "head_dim", None) or d // shape.num_attention_heads
        heads, pairs = shape.num_attention_heads * width, (shape.num_key_value_heads or 0) * width
        attention = 2 * FP32 * d + size * (2 * heads + 2 * pairs + d)  # both norms; q, k, v and the output; FFN's input
        mixing = 2 * d if experts > 1 else 0  # an expert's input and output
        each = attention + size * experts * (4 * shape.intermediate_size + mixing)
        return cls(tokens * layers * each, tokens * (layers * size * d + each))

    def recompute(self, setting: str) -> bool:
        """Whether the layers do, by a stage's `checkpoint_activations`."""
        return self.kept > MOST if setting == "auto" else setting == "true"


def activations(
    config: RunConfig, base: BaseModel, key: str, stage: OptimizerConfig, lengths: Sequence[int], world_size: int
) -> Activations:
    """Of the stage with these settings, the recipe's section `key`, at most, for rows of so many tokens."""
    rows = stage.batch // (world_size * stage.accumulation)
    longest = sorted(lengths, reverse=True)[:rows]
    tokens = sum(longest) if key in PACKED else rows * max(longest, default=0)
    axes = len(config.axes)
    experts = {"align": 1 + axes, "baselines.h3fusion": min(H3FUSION.top_k, axes), "baselines.trinityx": axes}
    first = 0 if key == "scratch.train" else min(base.layers)
    return Activations.estimate(base.config, base.dtype.itemsize, first, tokens, experts.get(key, 1))


def recompute(model: Any) -> None:
    """Let the decoder layers of a causal LM or an aligned model recompute their activations when it trains."""
    aligned = isinstance(model, AlignXForCausalLM)
    backbone = model.backbone if aligned else model
    contexts = model.forward_pass.contexts if aligned else recomputation.contexts
    # Renamed in transformers 5.23, where the old name warns.
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})
    backbone.disable_input_require_grads()  # they would take the backward pass through the frozen layers below
