"""A query's summary, its lexical scores and the gate's logits on CUDA: four Triton kernels for seventy of PyTorch.

Their time on the GPU is small either way. What counts is the host's: a short prefill waits for its launches.
Shapes: B rows, T tokens, d hidden size, H buckets, E experts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from alignx_ds.mocae import kernels

try:
    from alignx_ds.mocae import triton_query
    from alignx_ds.mocae.triton_launch import Kernel, Launch
except ImportError:  # as in kernels.py
    pass
else:
    SUMMARY, COUNT, SCORE, LOGITS = (
        Kernel(getattr(triton_query, name)) for name in ("summary", "count", "score", "logits")
    )


def summary(h: Tensor, mask: Tensor) -> Tensor:
    """`routing_state.prompt_summary` where `kernels.available`."""
    (b, t, d), h, mask = h.shape, h.contiguous(), mask.contiguous()
    out = torch.empty(b, 4 * d, dtype=torch.float32, device=h.device)
    _summary(b, t, d, h.dtype, mask.dtype)(h, mask, out)
    return out


def scores(
    ids: Tensor, mask: Tensor, rarity: Tensor, weights: Tensor, bias: Tensor, hashing: tuple[int, int, int]
) -> Tensor:
    """`lexical.Lexicon.forward` where `kernels.available`: [B, E] fp32. All but ids and mask [B, T] are fp32.

    `hashing` are the factors of a token and of its successor, and what is added to the latter.
    """
    (b, t), (experts, buckets), ids, mask = ids.shape, weights.shape, ids.contiguous(), mask.contiguous()
    counts = torch.zeros(b, buckets, dtype=torch.float32, device=ids.device)
    out = torch.empty(b, experts, dtype=torch.float32, device=ids.device)
    count, score = _scores(b, t, experts, buckets, hashing, ids.dtype, mask.dtype)
    count(ids, mask, counts)
    score(ids, mask, counts, rarity, weights, bias, out)
    return out


def logits(z: Tensor, given: tuple[Tensor, ...], constants: tuple[Tensor, ...], scales: int) -> Tensor:
    """`gate.CalibratedGate`'s, without further calibrators, where `kernels.available`: z [B, k] -> [B, E], all fp32.

    `given` and `constants` are the kernel's other arguments, in its order.
    """
    (b, k), experts, (anchors, leading) = z.shape, given[0].shape[1], constants[0].shape
    out = torch.empty(b, experts, dtype=torch.float32, device=z.device)
    _logits(b, experts, k, leading, anchors // experts, scales)(z.contiguous(), *given, *constants, out)
    return out


@lru_cache(maxsize=kernels.PLANS)
def _logits(b: int, experts: int, k: int, leading: int, anchors: int, scales: int) -> Launch:
    sizes = {"E": experts, "K": k, "F": leading, "M": anchors, "S": scales}
    return Launch(LOGITS, (b, 1, 1), (), **sizes, BK=1 << (k - 1).bit_length(), BM=1 << (anchors - 1).bit_length())


@lru_cache(maxsize=kernels.PLANS)
def _summary(b: int, t: int, d: int, dtype: torch.dtype, mask: torch.dtype) -> Launch:
    """A launch serves one combination of dtypes."""
    return Launch(SUMMARY, (-(-d // 64), b, 1), (t,), D=d, BT=64, BD=64)


@lru_cache(maxsize=kernels.PLANS)
def _scores(
    b: int, t: int, experts: int, buckets: int, hashing: tuple[int, int, int], ids: torch.dtype, mask: torch.dtype
) -> tuple[Launch, Launch]:
    assert buckets & (buckets - 1) == 0, "a power of two"
    factor, second, shift = hashing
    sizes = {"H": buckets, "FACTOR": factor, "SECOND": second, "SHIFT": shift}
    blocks = {"BT": 256, "BE": 1 << (experts - 1).bit_length()}
    return (
        Launch(COUNT, (-(-t // 256), b, 1), (t,), **sizes, BT=256),
        Launch(SCORE, (b, 1, 1), (t,), E=experts, **sizes, **blocks),
    )
