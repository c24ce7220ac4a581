"""The Triton kernels of kernels.py, which lists the shapes. Every tensor is contiguous; `rows` is B T."""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = ["T", "rows"]  # they vary between batches; without specialisation no kernel is compiled anew for them


@triton.jit(do_not_specialize=VARYING)
def latent(
    x, w, experts, out, T, N, K, R, rows, group_stride, expert_stride,
    STEPS: tl.constexpr, FIRST: tl.constexpr, SINGLE: tl.constexpr, EXACT: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[part, row, n] = Σ over the part of x[row, k] w[expert of the row, n, k]; FIRST is w's first expert.

    SINGLE: one token per row; a tile covers several of the T rows, and a program computes those of one expert.
    """
    tile, columns, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.cdiv(N, BN)
    t = tile * BT + tl.arange(0, BT)
    n = (columns % blocks) * BN + tl.arange(0, BN)
    if SINGLE:
        e = columns // blocks
        row = t.to(tl.int64)
        ids = tl.load(experts + t, mask=t < T, other=-1)
        own = (t < T) & ((ids == e + FIRST) | (FIRST == 0))
        written = own | ((ids == 0) & (e == 0))  # one program writes zeros to the generalist's rows
    else:
        b = columns // blocks
        e = tl.load(experts + b) - FIRST
        row = (b * T + t).to(tl.int64)
        own = (t < T) & (e >= 0)
        written = t < T
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    if tl.max(own.to(tl.int32), axis=0) > 0:
        ws = w + e.to(tl.int64) * expert_stride + (n // R).to(tl.int64) * group_stride + (n % R).to(tl.int64) * K
        for i in range(STEPS):
            k = (part * STEPS + i) * BK + tl.arange(0, BK)
            xs = tl.load(x + row[:, None] * K + k[None, :], mask=own[:, None] & (k < K)[None, :], other=0.0)
            wt = tl.load(ws[None, :] + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
            if EXACT:
                acc += tl.dot(xs.to(tl.float32), wt.to(tl.float32), input_precision="ieee")
            elif xs.dtype == wt.dtype:
                acc += tl.dot(xs, wt)
            else:
                acc += tl.dot(xs.to(tl.float32), wt.to(tl.float32), input_precision="tf32")
    there = written[:, None] & (n < N)[None, :]
    tl.store(out + (part * rows + row[:, None]).to(tl.int64) * N + n[None, :], acc, mask=there)


@triton.jit
def _sum(parts, row, n, there, rows, N, PARTS: tl.constexpr):
    total = tl.load(parts + row * N + n, mask=there, other=0.0)
    for part in range(1, PARTS):
        total += tl.load(parts + (part * rows + row) * N + n, mask=there, other=0.0)
    return total


@triton.jit
def _activated(a, KIND: tl.constexpr):
    if KIND == 1:
        return a * tl.sigmoid(a)
    inner = 0.7978845608028654 * (a + 0.044715 * a * a * a)
    return a * tl.sigmoid(2 * inner)  # (1 + tanh(x)) / 2 = σ(2 x)


@triton.jit
def _product(a, w, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a.to(tl.float32), w.to(tl.float32), input_precision="ieee")
    return tl.dot(a, w)


@triton.jit(do_not_specialize=VARYING)
def activate(
    gate, up, latent, w, experts, T, F, R, rows,
    S: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, SINGLE: tl.constexpr, EXACT: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """gate <- activation(gate + u w₀) (up + v w₁), with [u, v] the latent [P, rows, 2 r] and w [2, S, r, f]."""
    j = tl.program_id(0) * BF + tl.arange(0, BF)
    t, b = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(2)
    row = (b * T + t).to(tl.int64)[:, None]
    here = (t < T)[:, None] & (j < F)[None, :]
    place = row * F + j[None, :]
    g = tl.load(gate + place, mask=here, other=0.0)
    u = tl.load(up + place, mask=here, other=0.0)
    dtype = g.dtype
    r = tl.arange(0, BR)
    there, known = (t < T)[:, None] & (r < R)[None, :], (r < R)[:, None] & (j < F)[None, :]
    ws = w + r[:, None].to(tl.int64) * F + j[None, :]
    second = S * R * F
    if SINGLE:  # one expert after the other
        ids = tl.load(experts + t, mask=t < T, other=0)
        to_gate = _sum(latent, row, r[None, :], there, rows, 2 * R, PARTS)
        to_up = _sum(latent, row, R + r[None, :], there, rows, 2 * R, PARTS)
        more_g, more_u = tl.zeros((BT, BF), dtype=tl.float32), tl.zeros((BT, BF), dtype=tl.float32)
        for s in range(S):
            own = ids == s + 1
            if tl.max(own.to(tl.int32), axis=0) > 0:
                wg = tl.load(ws + s * R * F, mask=known, other=0.0)
                wu = tl.load(ws + s * R * F + second, mask=known, other=0.0)
                more_g += _product(tl.where(own[:, None], to_gate, 0.0).to(dtype), wg, EXACT)
                more_u += _product(tl.where(own[:, None], to_up, 0.0).to(dtype), wu, EXACT)
        g = (g.to(tl.float32) + more_g).to(dtype)
        u = (u.to(tl.float32) + more_u).to(dtype)
    else:
        e = tl.load(experts + b)
        if e > 0:
            to_gate = _sum(latent, row, r[None, :], there, rows, 2 * R, PARTS).to(dtype)
            to_up = _sum(latent, row, R + r[None, :], there, rows, 2 * R, PARTS).to(dtype)
            wg = tl.load(ws + (e - 1) * R * F, mask=known, other=0.0)
            wu = tl.load(ws + (e - 1) * R * F + second, mask=known, other=0.0)
            g = (g.to(tl.float32) + _product(to_gate, wg, EXACT)).to(dtype)
            u = (u.to(tl.float32) + _product(to_up, wu, EXACT)).to(dtype)
    a = _activated(g.to(tl.float32), KIND).to(dtype)
    tl.store(gate + place, (a.to(tl.float32) * u.to(tl.float32)).to(dtype), mask=here)


@triton.jit(do_not_specialize=VARYING)
def outward(
    y, latent, w, experts, T, D, R, rows,
    S: tl.constexpr, PARTS: tl.constexpr, SINGLE: tl.constexpr, EXACT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y += latent w, with the latent [P, rows, r] and w [S, r, d]; the generalist's rows are unchanged."""
    j = tl.program_id(0) * BD + tl.arange(0, BD)
    t, b = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(2)
    r = tl.arange(0, BR)
    row = (b * T + t).to(tl.int64)[:, None]
    here, there = (t < T)[:, None] & (j < D)[None, :], (t < T)[:, None] & (r < R)[None, :]
    place = row * D + j[None, :]
    known = (r < R)[:, None] & (j < D)[None, :]
    ws = w + r[:, None].to(tl.int64) * D + j[None, :]
    if SINGLE:
        ids = tl.load(experts + t, mask=t < T, other=0)
        old = tl.load(y + place, mask=here, other=0.0)
        v = _sum(latent, row, r[None, :], there, rows, R, PARTS)
        new = old.to(tl.float32)
        for s in range(S):
            own = ids == s + 1
            if tl.max(own.to(tl.int32), axis=0) > 0:
                wt = tl.load(ws + s * R * D, mask=known, other=0.0)
                new += _product(tl.where(own[:, None], v, 0.0).to(old.dtype), wt, EXACT)
        tl.store(y + place, new.to(old.dtype), mask=here)
    else:
        e = tl.load(experts + b)
        if e > 0:
            old = tl.load(y + place, mask=here, other=0.0)
            v = _sum(latent, row, r[None, :], there, rows, R, PARTS).to(old.dtype)
            wt = tl.load(ws + (e - 1) * R * D, mask=known, other=0.0)
            tl.store(y + place, (old.to(tl.float32) + _product(v, wt, EXACT)).to(old.dtype), mask=here)


@triton.jit(do_not_specialize=["rows"])
def calibrate_single(
    y, out, latent, bias, into, offset, back, rest, damping, reinjection, experts, D, L, rows, M,
    PARTS: tl.constexpr, SCALES: tl.constexpr, LEADING: tl.constexpr,
    BD: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """As `calibrate` with one token per row. Each program computes the row's step and loads everything at once."""
    row = tl.program_id(1)
    e = tl.load(experts + row)
    j, k = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BL)
    c, p = tl.arange(0, BS * BM), tl.arange(0, BP)
    scale, m = c // BM, c % BM
    inside = (scale < SCALES) & (m < M)
    kernel = scale * M + m
    kernels = SCALES * M
    rs = tl.load(reinjection + j[:, None] * L + k[None, :], mask=(j < D)[:, None] & (k < L)[None, :], other=0.0)
    old = tl.load(y + row.to(tl.int64) * D + j, mask=j < D, other=0.0)
    known = inside[:, None] & (k < L)[None, :]
    backs = tl.load(back + (e * kernels + kernel)[:, None] * L + k[None, :], mask=known, other=0.0)
    parts = tl.load(latent + (p[:, None] * rows + row) * L + k[None, :],
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
    tl.store(out + row.to(tl.int64) * D + j, new.to(old.dtype), mask=j < D)


@triton.jit(do_not_specialize=VARYING)
def calibrate(
    y, out, latent, bias, into, offset, back, rest, damping, reinjection, experts, T, D, L, rows, M,
    PARTS: tl.constexpr, SCALES: tl.constexpr, LEADING: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out = y + R step(z), z = latent + bias: output_calibration.OutputCalibration.forward under each row's expert."""
    t, b = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(2)
    e = tl.load(experts + b)
    row = (b * T + t).to(tl.int64)
    k, m = tl.arange(0, BL), tl.arange(0, BM)
    there = (t < T)[:, None] & (k < L)[None, :]
    z = _sum(latent, row[:, None], k[None, :], there, rows, L, PARTS)
    z += tl.load(bias + k, mask=k < L, other=0.0)[None, :]
    step = tl.load(rest + e * L + k, mask=k < L, other=0.0)[None, :]
    step = step + z * tl.load(damping + k, mask=k < L, other=0.0)[None, :]
    kernels = SCALES * M
    for scale in tl.static_range(SCALES):
        c = scale * M + m
        exponents = tl.load(offset + e * kernels + c, mask=m < M, other=-float("inf"))[None, :]
        exponents = tl.broadcast_to(exponents, (BT, BM))
        for i in tl.static_range(LEADING):
            zi = tl.sum(tl.where((k == i)[None, :], z, 0.0), axis=1)
            exponents += zi[:, None] * tl.load(into + (e * LEADING + i) * kernels + c, mask=m < M, other=0.0)[None, :]
        exponents = tl.exp(exponents - tl.max(exponents, axis=1)[:, None])
        weights = exponents / tl.sum(exponents, axis=1)[:, None]
        known = (m < M)[:, None] & (k < L)[None, :]
        backs = tl.load(back + (e * kernels + c)[:, None] * L + k[None, :], mask=known, other=0.0)
        step += tl.dot(weights, backs, input_precision=PRECISION)
    step = tl.where(there, step, 0.0)
    for chunk in range(CHUNKS):
        j = (tl.program_id(0) * CHUNKS + chunk) * BD + tl.arange(0, BD)
        here = (t < T)[:, None] & (j < D)[None, :]
        rs = tl.load(reinjection + j[None, :] * L + k[:, None], mask=(k < L)[:, None] & (j < D)[None, :], other=0.0)
        old = tl.load(y + row[:, None] * D + j[None, :], mask=here, other=0.0)
        new = old.to(tl.float32) + tl.dot(step, rs.to(tl.float32), input_precision=PRECISION)
        tl.store(out + row[:, None] * D + j[None, :], new.to(old.dtype), mask=here)
