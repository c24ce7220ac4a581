"""The kernels of alignx_ds.mocae.kernels, in Triton. Shapes there; every tensor is contiguous, `rows` is B T."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def latent(
    x, w, experts, out, T, N, K, R, rows, group_stride, expert_stride,
    STEPS: tl.constexpr, FIRST: tl.constexpr, EXACT: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[part, row, n] = Σ over the part of x[row, k] w[expert of the row, n, k]; FIRST is w's first expert."""
    tile, columns, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.cdiv(N, BN)
    b, block = columns // blocks, columns % blocks
    e = tl.load(experts + b) - FIRST
    t = tile * BT + tl.arange(0, BT)
    n = block * BN + tl.arange(0, BN)
    row = (b * T + t).to(tl.int64)
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    if e >= 0:
        ws = w + e.to(tl.int64) * expert_stride + (n // R).to(tl.int64) * group_stride + (n % R).to(tl.int64) * K
        for i in range(STEPS):
            k = (part * STEPS + i) * BK + tl.arange(0, BK)
            xs = tl.load(x + row[:, None] * K + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0)
            wt = tl.load(ws[None, :] + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
            if EXACT:
                acc += tl.dot(xs.to(tl.float32), wt.to(tl.float32), input_precision="ieee")
            elif xs.dtype == wt.dtype:
                acc += tl.dot(xs, wt)
            else:
                acc += tl.dot(xs.to(tl.float32), wt.to(tl.float32), input_precision="tf32")
    there = (t < T)[:, None] & (n < N)[None, :]
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
def activate(
    gate, up, latent, w, experts, T, F, R, rows, S,
    PARTS: tl.constexpr, KIND: tl.constexpr, EXACT: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """gate <- activation(gate + u w₀) (up + v w₁), with [u, v] the latent [P, rows, 2 r] and w [2, S, r, f]."""
    j = tl.program_id(0) * BF + tl.arange(0, BF)
    t, b = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(2)
    e = tl.load(experts + b)
    row = (b * T + t).to(tl.int64)[:, None]
    here = (t < T)[:, None] & (j < F)[None, :]
    place = row * F + j[None, :]
    g = tl.load(gate + place, mask=here, other=0.0)
    u = tl.load(up + place, mask=here, other=0.0)
    dtype = g.dtype
    if e > 0:
        r = tl.arange(0, BR)
        there, known = (t < T)[:, None] & (r < R)[None, :], (r < R)[:, None] & (j < F)[None, :]
        ws = w + ((e - 1) * R + r[:, None]).to(tl.int64) * F + j[None, :]
        second = S * R * F
        to_gate = _sum(latent, row, r[None, :], there, rows, 2 * R, PARTS).to(dtype)
        to_up = _sum(latent, row, R + r[None, :], there, rows, 2 * R, PARTS).to(dtype)
        wg = tl.load(ws, mask=known, other=0.0)
        wu = tl.load(ws + second, mask=known, other=0.0)
        if EXACT:
            g = (g.to(tl.float32) + tl.dot(to_gate.to(tl.float32), wg.to(tl.float32), input_precision="ieee")).to(dtype)
            u = (u.to(tl.float32) + tl.dot(to_up.to(tl.float32), wu.to(tl.float32), input_precision="ieee")).to(dtype)
        else:
            g = (g.to(tl.float32) + tl.dot(to_gate, wg)).to(dtype)
            u = (u.to(tl.float32) + tl.dot(to_up, wu)).to(dtype)
    a = _activated(g.to(tl.float32), KIND).to(dtype)
    tl.store(gate + place, (a.to(tl.float32) * u.to(tl.float32)).to(dtype), mask=here)


@triton.jit
def outward(
    y, latent, w, experts, T, D, R, rows,
    PARTS: tl.constexpr, EXACT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y += latent w, with the latent [P, rows, r] and w [S, r, d]; the generalist's rows stay as they are."""
    j = tl.program_id(0) * BD + tl.arange(0, BD)
    t, b = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(2)
    e = tl.load(experts + b)
    if e > 0:
        r = tl.arange(0, BR)
        row = (b * T + t).to(tl.int64)[:, None]
        here, there = (t < T)[:, None] & (j < D)[None, :], (t < T)[:, None] & (r < R)[None, :]
        place = row * D + j[None, :]
        old = tl.load(y + place, mask=here, other=0.0)
        v = _sum(latent, row, r[None, :], there, rows, R, PARTS).to(old.dtype)
        ws = w + ((e - 1) * R + r[:, None]).to(tl.int64) * D + j[None, :]
        wt = tl.load(ws, mask=(r < R)[:, None] & (j < D)[None, :], other=0.0)
        if EXACT:
            new = old.to(tl.float32) + tl.dot(v.to(tl.float32), wt.to(tl.float32), input_precision="ieee")
        else:
            new = old.to(tl.float32) + tl.dot(v, wt)
        tl.store(y + place, new.to(old.dtype), mask=here)


@triton.jit
def calibrate(
    y, out, latent, bias, into, offset, back, rest, damping, reinjection, experts, T, D, L, rows, M,
    PARTS: tl.constexpr, SCALES: tl.constexpr, LEADING: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, CHUNKS: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out = y + R step(z), z = latent + bias: output_calibration.OutputCalibration.forward, row by row's expert."""
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
