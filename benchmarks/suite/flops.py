"""FLOPs per token of a training step: multiplications and additions of the GEMMs, without attention scores.

A GEMM with P weights takes 2 P per token forward, 2 P for the gradient of its input and 2 P for that of its weights. An
input has no gradient where nothing below it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Weights:
    """The numbers of weights in the GEMMs of one decoder layer, and in the head."""

    layers: int
    attention: int
    ffn: int
    head: int

    @classmethod
    def of(cls, c: PreTrainedConfig) -> Weights:
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        attention = c.hidden_size * width * 2 * (c.num_attention_heads + c.num_key_value_heads)
        ffn = 3 * c.hidden_size * c.intermediate_size
        return cls(c.num_hidden_layers, attention, ffn, c.hidden_size * c.vocab_size)


def stage1(c: PreTrainedConfig) -> float:
    """The FFNs of the upper half are trained (suite.training.stage1)."""
    w = Weights.of(c)
    trained = w.layers - w.layers // 2
    forward = w.layers * (w.attention + w.ffn) + w.head
    to_inputs = (
        (trained - 1) * (w.attention + w.ffn) + w.ffn / 3 + w.head
    )  # the lowest trained layer: only its down projection
    return 2.0 * (forward + to_inputs + trained * w.ffn)


def stage2(c: PreTrainedConfig, experts: int, rank: int, *, fused: bool = False) -> float:
    """In training every token goes through every expert; factors and calibrations are trained.

    On the fused path the base's FFN runs once for all experts, and the generalist has no factors.
    """
    ffns, specialists = (1, experts - 1) if fused else (experts, experts)
    w = Weights.of(c)
    factors = 3 * rank * (c.hidden_size + c.intermediate_size)
    layer = w.attention + ffns * w.ffn + specialists * factors
    forward = w.layers * layer + w.head
    to_inputs = (w.layers - 1) * layer + ffns * w.ffn / 3 + w.head
    return 2.0 * (forward + to_inputs + w.layers * specialists * factors)
