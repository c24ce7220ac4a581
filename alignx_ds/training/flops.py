"""FLOPs per token of a training step: multiplications and additions of the GEMMs, without attention scores.

A GEMM with P weights takes 2 P per token forward, 2 P for the gradient of its input and 2 P for that of its weights. An
input has no gradient where nothing below it is trained. What activation checkpointing computes twice counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from alignx_ds.mocae.backbones import backbone_of


@dataclass(frozen=True)
class Weights:
    """The numbers of weights in the GEMMs of one decoder layer, and in the head.

    Of an FFN that is a mixture of experts, those that a token goes through, without the router's.
    """

    layers: int
    attention: int
    ffn: int
    head: float  # those that a token goes through, on average

    @classmethod
    def of(cls, c: PreTrainedConfig, learned: float = 1.0) -> Weights:
        """`learned` is the share of the tokens whose next one the loss counts: the head computes no others."""
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        attention = c.hidden_size * width * 2 * (c.num_attention_heads + c.num_key_value_heads)
        ffn = 3 * c.hidden_size * backbone_of(c.model_type).active_width(c)
        return cls(c.num_hidden_layers, attention, ffn, learned * c.hidden_size * c.vocab_size)


def whole_model(c: PreTrainedConfig, learned: float = 1.0) -> float:
    """Every weight is trained, so that every GEMM takes 6 P."""
    w = Weights.of(c, learned)
    return 6.0 * (w.layers * (w.attention + w.ffn) + w.head)


def fine_tune(c: PreTrainedConfig, layers: Sequence[int], factors: int | None = None, *, learned: float = 1.0) -> float:
    """Stage 1: the FFNs of these layers are trained, or so many numbers of low-rank factors in each."""
    w = Weights.of(c, learned)
    if factors is not None:
        return _step(w, layers, ffn=w.ffn + factors, to_lowest=w.ffn / 3, trained=factors)
    return _step(w, layers, ffn=w.ffn, to_lowest=w.ffn / 3, trained=w.ffn)


def mixture(
    c: PreTrainedConfig,
    layers: Sequence[int],
    experts: int,
    rank: int,
    *,
    fused: bool,
    factors_trained: bool = True,
    learned: float = 1.0,
) -> float:
    """Stage 2: every token goes through `experts` experts of low rank in these layers.

    On the fused path the base's FFN runs once for all of them, and the generalist, one of them, has no factors.
    """
    w = Weights.of(c, learned)
    ffns, specialists = (1, experts - 1) if fused else (experts, experts)
    factors = specialists * 3 * rank * (c.hidden_size + c.intermediate_size)
    trained = factors if factors_trained else 0
    return _step(w, layers, ffn=ffns * w.ffn + factors, to_lowest=ffns * w.ffn / 3, trained=trained)


def fusion(
    c: PreTrainedConfig, layers: Sequence[int], experts: int, *, experts_trained: bool = True, learned: float = 1.0
) -> float:
    """A mixture of full FFN copies in these layers: every token goes through `experts` of them."""
    w = Weights.of(c, learned)
    ffn = experts * w.ffn
    return _step(w, layers, ffn=ffn, to_lowest=ffn / 3 if experts_trained else 0, trained=ffn if experts_trained else 0)


def _step(w: Weights, layers: Sequence[int], *, ffn: float, to_lowest: float, trained: float) -> float:
    """The chosen `layers` have `ffn` weights each beside their attention, of which `trained` are trained.

    In the lowest of them `to_lowest` weights have an input with a gradient: the down projections'.
    """
    chosen, first = len(layers), min(layers)
    plain, hosting = w.attention + w.ffn, w.attention + ffn
    forward = (w.layers - chosen) * plain + chosen * hosting + w.head
    to_inputs = (w.layers - chosen - first) * plain + (chosen - 1) * hosting + to_lowest + w.head
    return 2.0 * (forward + to_inputs + chosen * trained)
