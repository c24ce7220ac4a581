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
from alignx_ds.mocae.backbones import backbone_of
from alignx_ds.mocae.mixed_activations import AT_ONCE
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.architecture import caps_attention
from alignx_ds.models.base import BaseModel

MOST = 8 * 2**30  # bytes on a rank: `auto` recomputes where the activations would take more
PACKED = ("train", "scratch.train")  # stages whose micro batches hold several rows in a line
FP32 = 4  # bytes of a number


@dataclass(frozen=True)
class Ffn:
    """What a decoder layer's FFN, or the mixture in its place, keeps of a token: numbers of its width f and of d."""

    wide: int  # times f
    narrow: int = 0  # times d, beside its input
    passing: int = 3  # times f, beside these while its backward pass runs
    of_parts: int = 0  # times f more, of as many tokens as it takes at once
    first: int | None = None  # `wide` in the lowest layer that is trained, whose input has no gradient, if it differs
    latent: int = 0  # more numbers, of the experts' low-rank factors,
    fp32: int = 0  # and of the output calibration

    @classmethod
    def of(cls, config: RunConfig, key: str, picked: int = 0) -> Ffn:
        """In the stage at this key of the recipe; `picked`: a token's experts of an FFN that is a mixture already.

        Counted with torch's saved tensors.
        """
        if key == "train" and config.train.trainable == "lora" and config.train.lora.dropout:
            return cls(5, 2)  # each projection's factors have their own copy of its input
        axes, gate, trained = len(config.axes), config.gate, config.align.expert_lr_scale > 0
        if key == "align":
            e = 1 + axes
            calibration = 2 * e * gate.scales * gate.anchors if gate.output_latent else 0
            if picked:
                return cls(DENSE.wide, picked, first=0, fp32=calibration)
            if config.align.ep_size == 0:
                factors, rank = 3 * axes, config.experts.rank  # a rank of 0 is a full one, at most d
                narrow, latent = (2, factors * rank) if rank else (2 + factors, 0)
                return cls(2, narrow, of_parts=6, latent=latent, fp32=calibration)  # mocae/mixed_activations.py
            many = {"passing": 7, "fp32": calibration}
            return cls(4 * e, 2 * e, **many) if trained else cls(3 * e, e, first=0, **many)
        if picked:
            return cls(DENSE.wide, picked)
        experts = {"baselines.h3fusion": min(H3FUSION.top_k, axes), "baselines.trinityx": axes}.get(key, 0)
        return cls(4 * experts, 2 * experts, passing=7) if experts else DENSE


DENSE = Ffn(4)


@dataclass(frozen=True)
class Activations:
    """An estimate of what the decoder layers hold of one micro batch in training, in bytes of one rank.

    `kept` is what torch saves for SDPA attention, RMSNorms and gated FFNs: 162 kB per token and layer at LLaMA-2-7B's
    shape in bf16. Layers below the lowest one that is trained keep nothing. The logits are not part of it.
    """

    kept: float  # for the backward pass
    inputs: float  # kept where the layers recompute, and
    layer: float  # what the layer that is recomputed keeps
    gradients: float  # of activations, while a layer's backward pass runs

    @classmethod
    def estimate(
        cls, shape: PreTrainedConfig, size: int, first: int | None, tokens: int, ffn: Ffn = DENSE, eager: int = 0
    ) -> Activations:
        """Of a model in a dtype of `size` bytes, trained from layer `first` on; None: with its embedding.

        `eager`: the tokens that each attends to with eager attention, which keeps its probabilities.
        """
        d, f = shape.hidden_size, backbone_of(shape.model_type).active_width(shape)
        layers = shape.num_hidden_layers - (first or 0)
        width = getattr(shape, "head_dim", None) or d // shape.num_attention_heads
        heads, pairs = shape.num_attention_heads * width, (shape.num_key_value_heads or 0) * width
        pairs = heads if eager else pairs  # each head has its own copy
        attention = 2 * FP32 * d + size * (2 * heads + 2 * pairs)  # both norms; q, k, v and the output
        attention += shape.num_attention_heads * eager * (FP32 + (size if size < FP32 else 0))
        each = attention + size * (d + ffn.wide * f + ffn.narrow * d + ffn.latent) + FP32 * ffn.fp32
        missing = attention + size * f * (0 if ffn.first is None else ffn.wide - ffn.first)  # in the lowest layer
        of_parts = size * ffn.of_parts * min(tokens * f, AT_ONCE)
        gradients = tokens * size * (ffn.passing * f + 2 * d) + of_parts
        kept = layers * each - (0 if first is None else missing) + FP32 * d  # the last norm
        return cls(tokens * kept, tokens * layers * size * d, tokens * each, gradients)

    @property
    def recomputed(self) -> float:
        """What is kept at most where the layers recompute."""
        return self.inputs + self.layer

    def recompute(self, setting: str) -> bool:
        """Whether the layers do, by a stage's `checkpoint_activations`."""
        return self.kept > MOST if setting == "auto" else setting == "true"


def activations(
    config: RunConfig, base: BaseModel, key: str, stage: OptimizerConfig, lengths: Sequence[int], world_size: int
) -> Activations:
    """Of the stage with these settings, the recipe's section `key`, at most, for rows of so many tokens."""
    tokens, first = tokens_of(key, stage, lengths, world_size), None if config.trains_all(key) else min(base.layers)
    is_eager = config.model.attention == "eager" or (config.model.attention == "auto" and caps_attention(base.config))
    eager = max(lengths, default=0) if is_eager else 0
    ffn = Ffn.of(config, key, 0 if base.table.projections else base.config.num_experts_per_tok)
    return Activations.estimate(base.config, base.dtype.itemsize, first, tokens, ffn, eager)


def tokens_of(key: str, stage: OptimizerConfig, lengths: Sequence[int], world_size: int) -> int:
    """The tokens of a rank's micro batch with the longest rows, with padding."""
    rows = stage.batch // (world_size * stage.accumulation)
    longest = sorted(lengths, reverse=True)[:rows]
    return sum(longest) if key in PACKED else rows * max(longest, default=0)


def recompute(model: Any) -> None:
    """Let the decoder layers of a causal LM or an aligned model recompute their activations when it trains."""
    aligned = isinstance(model, AlignXForCausalLM)
    backbone = model.backbone if aligned else model
    contexts = model.forward_pass.contexts if aligned else recomputation.contexts
    # Renamed in transformers 5.23, where the old name warns.
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})
    backbone.disable_input_require_grads()  # they would take the backward pass through the frozen layers below
