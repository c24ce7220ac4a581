"""The Triton kernels of query_kernels.py. Parameters are as in triton_kernels.py; every tensor is contiguous."""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ["T"]


@triton.jit(do_not_specialize=COUNTS)
def summary(h, mask, out, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """out [B, 4, D] fp32: mean, largest, smallest and last h over the tokens of the mask, h [B, T, D], mask [B, T]."""
    b, j = tl.program_id(1).to(tl.int64), tl.program_id(0) * BD + tl.arange(0, BD)
    known = j < D
    last, count = 0, 0
    start = 0
    while start < T:  # Triton's interpreter has no range() over counts
        t = start + tl.arange(0, BT)
        inside = tl.load(mask + b * T + t, mask=t < T, other=0) != 0
        last = tl.maximum(last, tl.max(tl.where(inside, t, 0), axis=0))
        count += tl.sum(inside.to(tl.int32), axis=0)
        start += BT
    final = tl.load(h + (b * T + last) * D + j, mask=known, other=0.0).to(tl.float32)
    mean, high, low = tl.zeros((BD,), dtype=tl.float32), final, final
    start = 0
    while start < T:
        t = start + tl.arange(0, BT)
        inside = (tl.load(mask + b * T + t, mask=t < T, other=0) != 0)[:, None] & known[None, :]
        x = tl.load(h + (b * T + t)[:, None] * D + j[None, :], mask=inside, other=0.0).to(tl.float32)
        mean += tl.sum(x, axis=0)
        high = tl.maximum(high, tl.max(tl.where(inside, x, -float("inf")), axis=0))
        low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), axis=0))
        start += BT
    place = out + b * 4 * D + j
    tl.store(place, mean / tl.maximum(count, 1).to(tl.float32), mask=known)
    tl.store(place + D, high, mask=known)
    tl.store(place + 2 * D, low, mask=known)
    tl.store(place + 3 * D, final, mask=known)


@triton.jit
def ngrams(ids, mask, b, t, T, H: tl.constexpr, FACTOR: tl.constexpr, SECOND: tl.constexpr, SHIFT: tl.constexpr):
    """(bucket of the token, whether it is inside, bucket of it and the next, whether both are inside): lexical.ngrams.

    H is a power of two.
    """
    place, here, there = b * T + t, t < T, t + 1 < T
    one, two = tl.load(ids + place, mask=here, other=0), tl.load(ids + place + 1, mask=there, other=0)
    inside = tl.load(mask + place, mask=here, other=0) != 0
    both = inside & (tl.load(mask + place + 1, mask=there, other=0) != 0)
    first = one * FACTOR
    return first & (H - 1), inside, (first ^ (two * SECOND + SHIFT)) & (H - 1), both


@triton.jit(do_not_specialize=COUNTS)
def count(
    ids, mask, out, T,
    H: tl.constexpr, FACTOR: tl.constexpr, SECOND: tl.constexpr, SHIFT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out [B, H] += how often each bucket occurs within the mask, for ids and mask [B, T]."""
    b, t = tl.program_id(1).to(tl.int64), tl.program_id(0) * BT + tl.arange(0, BT)
    token, inside, pair, both = ngrams(ids, mask, b, t, T, H, FACTOR, SECOND, SHIFT)
    one = tl.full((BT,), 1.0, dtype=tl.float32)
    tl.atomic_add(out + b * H + token, one, mask=inside)
    tl.atomic_add(out + b * H + pair, one, mask=both)


@triton.jit
def weighed(counts, rarity, weights, e, bucket, inside, E: tl.constexpr, H: tl.constexpr):
    """([BE] Σ weight·tfidf and [BT] tfidf² of these occurrences, both before the division by the norm)."""
    times = tl.load(counts + bucket, mask=inside, other=1.0)
    worth = (1 + tl.log(times)) * tl.load(rarity + bucket, mask=inside, other=0.0)
    known = (e < E)[:, None] & inside[None, :]
    w = tl.load(weights + e[:, None] * H + bucket[None, :], mask=known, other=0.0)
    return tl.sum(w * (worth / times)[None, :], axis=1), worth * worth / times


@triton.jit(do_not_specialize=COUNTS)
def score(
    ids, mask, counts, rarity, weights, bias, out, T,
    E: tl.constexpr, H: tl.constexpr, FACTOR: tl.constexpr, SECOND: tl.constexpr, SHIFT: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out [B, E] = the scores of lexical.Lexicon, with rarity [H], weights [E, H] and bias [E]."""
    b, e = tl.program_id(0).to(tl.int64), tl.arange(0, BE)
    sums, squares = tl.zeros((BE,), dtype=tl.float32), tl.zeros((BT,), dtype=tl.float32)
    start = 0
    while start < T:
        t = start + tl.arange(0, BT)
        token, inside, pair, both = ngrams(ids, mask, b, t, T, H, FACTOR, SECOND, SHIFT)
        own, square = weighed(counts + b * H, rarity, weights, e, token, inside, E, H)
        own_2, square_2 = weighed(counts + b * H, rarity, weights, e, pair, both, E, H)
        sums, squares = sums + own + own_2, squares + square + square_2
        start += BT
    norm = tl.maximum(tl.sqrt(tl.sum(squares, axis=0)), 1e-12)
    tl.store(out + b * E + e, sums / norm + tl.load(bias + e, mask=e < E, other=0.0), mask=e < E)


@triton.jit
def logits(
    z, linear, whitened, words, temperature, anchors, squares, slope, spread, dimensions,
    offsets, log_volumes, shift, weight, scale, present, otherwise, out,
    E: tl.constexpr, K: tl.constexpr, F: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out [B, E]: the logits of gate.CalibratedGate for z [B, K], linear and words [B, E], and whitened [B, E·K].

    The others are those of gate.Constants: anchors [E·M, F], squares and slope [S], offsets [E, K], and 4 terms.
    """
    b, k, m = tl.program_id(0), tl.arange(0, BK), tl.arange(0, BM)
    for e in tl.static_range(E):
        far = tl.load(whitened + (b * E + e) * K + k, mask=k < K, other=0.0)
        far -= tl.load(offsets + e * K + k, mask=k < K, other=0.0)
        squared = tl.zeros((BM,), dtype=tl.float32)
        for i in tl.static_range(F):
            step = tl.load(z + b * K + i) - tl.load(anchors + (e * M + m) * F + i, mask=m < M, other=0.0)
            squared += step * step
        mean, tilt = 0.0, 0.0
        for s in tl.static_range(S):
            exponents = tl.where(m < M, -0.5 * squared / tl.load(squares + s), -float("inf"))
            most = tl.max(exponents, axis=0)
            mass = most + tl.log(tl.sum(tl.exp(exponents - most), axis=0) / M)
            mean += mass / S
            tilt += mass * tl.load(slope + s)
        fractal = mean - tl.abs(tilt / tl.load(spread) - tl.load(dimensions + e))
        natural = (0.5 * tl.sum(far * far, axis=0) + tl.load(log_volumes + e)) / -K - 0.9189385332046727
        own, lexical = tl.load(linear + b * E + e), tl.load(words + b * E + e)
        total = (own - tl.load(shift)) * tl.load(weight) / tl.load(scale)
        total += (fractal - tl.load(shift + 1)) * tl.load(weight + 1) / tl.load(scale + 1)
        total += (natural - tl.load(shift + 2)) * tl.load(weight + 2) / tl.load(scale + 2)
        total += (lexical - tl.load(shift + 3)) * tl.load(weight + 3) / tl.load(scale + 3)
        total = tl.where(tl.load(present + e) > 0, total, 4 * tl.load(otherwise + e))
        tl.store(out + b * E + e, total / tl.load(temperature))
