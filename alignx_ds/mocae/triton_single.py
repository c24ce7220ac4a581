"""The Triton kernels of kernels.py for one token a row, with the names and the results of those in triton_kernels.py.

A tile covers several of the B rows, whose experts differ: a program computes one expert's rows, or one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from alignx_ds.mocae.triton_kernels import activated, product, total

COUNTS = ["B"]


@triton.jit(do_not_specialize=COUNTS)
def latent(
    x, w, experts, out, B,
    GROUPS: tl.constexpr, S: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr,
    EXACT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same for the rows of one expert, and zeros for the generalist's, which the first expert's program writes."""
    N: tl.constexpr = GROUPS * R
    blocks: tl.constexpr = (N + BN - 1) // BN
    e, part = tl.program_id(1) // blocks, tl.program_id(2)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = (tl.program_id(1) % blocks) * BN + tl.arange(0, BN)
    row = t.to(tl.int64)
    ids = tl.load(experts + t, mask=t < B, other=-1)
    own = ids == e + 1
    written = own | ((ids == 0) & (e == 0))
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    if tl.max(own.to(tl.int32), axis=0) > 0:
        ws = w + e.to(tl.int64) * R * K + (n // R).to(tl.int64) * S * R * K + (n % R) * K
        for i in range(STEPS):
            k = (part * STEPS + i) * BK + tl.arange(0, BK)
            xs = tl.load(x + row[:, None] * K + k[None, :], mask=own[:, None] & (k < K)[None, :], other=0.0)
            wt = tl.load(ws[None, :] + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
            acc += product(xs, wt, EXACT)
    tl.store(out + (part * B + row[:, None]) * N + n[None, :], acc, mask=written[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def activate(
    gate, up, latent, w, experts, B,
    S: tl.constexpr, R: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr,
    EXACT: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The same without what `down` makes of it."""
    j, r = tl.program_id(0) * BF + tl.arange(0, BF), tl.arange(0, BR)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row = t.to(tl.int64)[:, None]
    here, there = (t < B)[:, None] & (j < F)[None, :], (t < B)[:, None] & (r < R)[None, :]
    place = row * F + j[None, :]
    g, u = tl.load(gate + place, mask=here, other=0.0), tl.load(up + place, mask=here, other=0.0)
    dtype = g.dtype
    ids = tl.load(experts + t, mask=t < B, other=0)
    to_gate = total(latent, row, r[None, :], there, B, 2 * R, PARTS)
    to_up = total(latent, row, R + r[None, :], there, B, 2 * R, PARTS)
    known, ws = (r < R)[:, None] & (j < F)[None, :], w + r[:, None] * F + j[None, :]
    more_g, more_u = tl.zeros((BT, BF), dtype=tl.float32), tl.zeros((BT, BF), dtype=tl.float32)
    for s in range(S):
        own = ids == s + 1
        if tl.max(own.to(tl.int32), axis=0) > 0:
            wg = tl.load(ws + s * R * F, mask=known, other=0.0)
            wu = tl.load(ws + (S + s) * R * F, mask=known, other=0.0)
            more_g += product(tl.where(own[:, None], to_gate, 0.0).to(dtype), wg, EXACT)
            more_u += product(tl.where(own[:, None], to_up, 0.0).to(dtype), wu, EXACT)
    g = (g.to(tl.float32) + more_g).to(dtype)
    u = (u.to(tl.float32) + more_u).to(dtype)
    a = activated(g.to(tl.float32), KIND).to(dtype)
    tl.store(gate + place, (a.to(tl.float32) * u.to(tl.float32)).to(dtype), mask=here)


@triton.jit(do_not_specialize=COUNTS)
def outward(
    y, latent, w, projection, experts, out, B,
    S: tl.constexpr, R: tl.constexpr, D: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr,
    EXACT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """The same with every tile of y a part of its own in `out`."""
    part = tl.program_id(0)
    j, r, k = part * BD + tl.arange(0, BD), tl.arange(0, BR), tl.arange(0, BL)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row = t.to(tl.int64)[:, None]
    here, there = (t < B)[:, None] & (j < D)[None, :], (t < B)[:, None] & (r < R)[None, :]
    place = row * D + j[None, :]
    old = tl.load(y + place, mask=here, other=0.0)
    ids = tl.load(experts + t, mask=t < B, other=0)
    v = total(latent, row, r[None, :], there, B, R, PARTS)
    known, ws = (r < R)[:, None] & (j < D)[None, :], w + r[:, None] * D + j[None, :]
    new = old.to(tl.float32)
    for s in range(S):
        own = ids == s + 1
        if tl.max(own.to(tl.int32), axis=0) > 0:
            wt = tl.load(ws + s * R * D, mask=known, other=0.0)
            new += product(tl.where(own[:, None], v, 0.0).to(old.dtype), wt, EXACT)
    tl.store(y + place, new.to(old.dtype), mask=here)
    if L > 0:
        known = (k < L)[None, :] & (j < D)[:, None]
        onto = tl.load(projection + k[None, :] * D + j[:, None], mask=known, other=0.0)
        z = product(new.to(old.dtype), onto, EXACT)
        tl.store(out + (part * B + row) * L + k[None, :], z, mask=(t < B)[:, None] & (k < L)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def calibrate(
    y, latent, bias, into, offset, back, rest, damping, reinjection, experts, B,
    D: tl.constexpr, L: tl.constexpr, M: tl.constexpr, SCALES: tl.constexpr, LEADING: tl.constexpr,
    PARTS: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The same. Each program computes the row's step and loads everything at once."""
    row = tl.program_id(1)
    e = tl.load(experts + row)
    j, k = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BL)
    c, p = tl.arange(0, BS * BM), tl.arange(0, BP)
    scale, m = c // BM, c % BM
    inside = (scale < SCALES) & (m < M)
    kernel = scale * M + m
    kernels: tl.constexpr = SCALES * M
    rs = tl.load(reinjection + j[:, None] * L + k[None, :], mask=(j < D)[:, None] & (k < L)[None, :], other=0.0)
    old = tl.load(y + row.to(tl.int64) * D + j, mask=j < D, other=0.0)
    known = inside[:, None] & (k < L)[None, :]
    backs = tl.load(back + (e * kernels + kernel)[:, None] * L + k[None, :], mask=known, other=0.0)
    parts = tl.load(latent + (p[:, None] * B + row) * L + k[None, :],
                    mask=(p < PARTS)[:, None] & (k < L)[None, :], other=0.0)  # fmt: skip
    z = tl.sum(parts, axis=0) + tl.load(bias + k, mask=k < L, other=0.0)
    exponents = tl.load(offset + e * kernels + kernel, mask=inside, other=-1e30)
    for i in tl.static_range(LEADING):
        zi = tl.sum(tl.where(k == i, z, 0.0), axis=0)
        exponents += zi * tl.load(into + (e * LEADING + i) * kernels + kernel, mask=inside, other=0.0)
    table = tl.reshape(exponents, (BS, BM))
    table = tl.exp(table - tl.max(table, axis=1)[:, None])
    table = table / tl.sum(table, axis=1)[:, None]
    weights = tl.where(inside, tl.reshape(table, (BS * BM,)), 0.0)
    step = tl.load(rest + e * L + k, mask=k < L, other=0.0)
    step += z * tl.load(damping + k, mask=k < L, other=0.0)
    step += tl.sum(weights[:, None] * backs, axis=0)
    new = old.to(tl.float32) + tl.sum(rs * step[None, :], axis=1)
    tl.store(y + row.to(tl.int64) * D + j, new.to(old.dtype), mask=j < D)
