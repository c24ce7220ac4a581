"""A query's summary and its lexical scores on CUDA, in three Triton kernels instead of some forty of PyTorch.

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
    SUMMARY, COUNT, SCORE = (Kernel(getattr(triton_query, name)) for name in ("summary", "count", "score"))


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
