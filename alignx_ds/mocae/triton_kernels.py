"""The Triton kernels of kernels.py for several tokens a row, and what those for one token share with them.

kernels.py lists the shapes. Every tensor is contiguous. Parameters are tensors, then counts that vary between batches,
then constants (triton_launch.py); `rows` is B T.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ["T", "rows"]  # without specialisation no kernel is compiled anew for them


@triton.jit
def total(parts, row, n, there, rows, N: tl.constexpr, PARTS: tl.constexpr):
    """Σ over the parts of parts[part, row, n]."""
    found = tl.load(parts + row * N + n, mask=there, other=0.0)
    for part in tl.static_range(1, PARTS):  # all loads at once
        found += tl.load(parts + (part * rows + row) * N + n, mask=there, other=0.0)
    return found


@triton.jit
def activated(a, KIND: tl.constexpr):
    """SiLU, or GELU in its tanh form."""
    if KIND == 1:
        return a * tl.sigmoid(a)
    inner = 0.7978845608028654 * (a + 0.044715 * a * a * a)
    return a * tl.sigmoid(2 * inner)  # (1 + tanh(x)) / 2 = σ(2 x)


@triton.jit
def product(a, w, EXACT: tl.constexpr):
    """a w, summed in fp32; with EXACT multiplied in fp32 too, else factors of two dtypes in TF32."""
    if EXACT:
        return tl.dot(a.to(tl.float32), w.to(tl.float32), input_precision="ieee")
    if a.dtype == w.dtype:
        return tl.dot(a, w)
    return tl.dot(a.to(tl.float32), w.to(tl.float32), input_precision="tf32")


@triton.jit(do_not_specialize=COUNTS)
def latent(
    x, w, experts, out, T, rows,
    GROUPS: tl.constexpr, S: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr,
    EXACT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[part, row, n] = Σ over the part of x[row, k] w[expert, n, k] for w [GROUPS, S, R, K]; zero without w."""
    N: tl.constexpr = GROUPS * R
    blocks: tl.constexpr = (N + BN - 1) // BN
    b, part = tl.program_id(1) // blocks, tl.program_id(2)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = (tl.program_id(1) % blocks) * BN + tl.arange(0, BN)
    e = tl.load(experts + b) - 1
    row = (b * T + t).to(tl.int64)
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    if e >= 0:
        ws = w + e.to(tl.int64) * R * K + (n // R).to(tl.int64) * S * R * K + (n % R) * K
        for i in range(STEPS):
            k = (part * STEPS + i) * BK + tl.arange(0, BK)
            xs = tl.load(x + row[:, None] * K + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0)
            wt = tl.load(ws[None, :] + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
            acc += product(xs, wt, EXACT)
    tl.store(out + (part * rows + row[:, None]) * N + n[None, :], acc, mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def activate(
    gate, up, latent, w, down, experts, out, T, rows,
    S: tl.constexpr, R: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, KIND: tl.constexpr,
    EXACT: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """gate <- a = activation(gate + u w₀) (up + v w₁), with [u, v] the latent [P, rows, 2 R] and w [2, S, R, F].

    out[part, row, r] = Σ over the part of a[row, j] down[expert, r, j], with down [S, R, F].
    """
    part, b = tl.program_id(1), tl.program_id(2)
    t, r = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BR)
    row = (b * T + t).to(tl.int64)[:, None]
    here, there = (t < T)[:, None], (t < T)[:, None] & (r < R)[None, :]
    e = tl.load(experts + b)
    own = (tl.maximum(e, 1) - 1).to(tl.int64) * R * F  # the generalist's rows have a latent of zeros
    to_gate = total(latent, row, r[None, :], there, rows, 2 * R, PARTS).to(gate.dtype.element_ty)
    to_up = total(latent, row, R + r[None, :], there, rows, 2 * R, PARTS).to(gate.dtype.element_ty)
    acc = tl.zeros((BT, BR), dtype=tl.float32)
    for i in range(STEPS):
        j = (part * STEPS + i) * BF + tl.arange(0, BF)
        inside, known = here & (j < F)[None, :], (r < R)[:, None] & (j < F)[None, :]
        place = row * F + j[None, :]
        g, u = tl.load(gate + place, mask=inside, other=0.0), tl.load(up + place, mask=inside, other=0.0)
        ws = w + own + r[:, None] * F + j[None, :]
        wg, wu = tl.load(ws, mask=known, other=0.0), tl.load(ws + S * R * F, mask=known, other=0.0)
        wd = tl.load(down + own + r[None, :] * F + j[:, None], mask=(r < R)[None, :] & (j < F)[:, None], other=0.0)
        g = (g.to(tl.float32) + product(to_gate, wg, EXACT)).to(g.dtype)
        u = (u.to(tl.float32) + product(to_up, wu, EXACT)).to(g.dtype)
        a = activated(g.to(tl.float32), KIND).to(g.dtype)
        a = (a.to(tl.float32) * u.to(tl.float32)).to(g.dtype)
        tl.store(gate + place, a, mask=inside)
        acc += product(a, wd, EXACT)
    acc = tl.where(e > 0, acc, 0.0)
    tl.store(out + (part * rows + row) * R + r[None, :], acc, mask=there)


@triton.jit(do_not_specialize=COUNTS)
def outward(
    y, latent, w, projection, experts, out, T, rows,
    R: tl.constexpr, D: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
    EXACT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """y += latent w, with the latent [P, rows, R] and w [S, R, D].

    Unless L is 0, out[part, row, k] = Σ over the part of y[row, j] projection[k, j], with projection [L, D] in fp32.
    """
    part, b = tl.program_id(1), tl.program_id(2)
    t, r, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BR), tl.arange(0, BL)
    row = (b * T + t).to(tl.int64)[:, None]
    here = (t < T)[:, None]
    own = (tl.maximum(tl.load(experts + b), 1) - 1).to(tl.int64) * R * D  # the generalist's rows have zeros
    v = total(latent, row, r[None, :], here & (r < R)[None, :], rows, R, PARTS).to(y.dtype.element_ty)
    acc = tl.zeros((BT, BL), dtype=tl.float32)
    for i in range(STEPS):
        j = (part * STEPS + i) * BD + tl.arange(0, BD)
        inside, place = here & (j < D)[None, :], row * D + j[None, :]
        old = tl.load(y + place, mask=inside, other=0.0)
        wt = tl.load(w + own + r[:, None] * D + j[None, :], mask=(r < R)[:, None] & (j < D)[None, :], other=0.0)
        new = (old.to(tl.float32) + product(v, wt, EXACT)).to(old.dtype)
        tl.store(y + place, new, mask=inside)
        if L > 0:
            known = (k < L)[None, :] & (j < D)[:, None]
            acc += product(new, tl.load(projection + k[None, :] * D + j[:, None], mask=known, other=0.0), EXACT)
    if L > 0:
        tl.store(out + (part * rows + row) * L + k[None, :], acc, mask=here & (k < L)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def calibrate(
    y, latent, bias, into, offset, back, rest, damping, reinjection, experts, T, rows,
    D: tl.constexpr, L: tl.constexpr, M: tl.constexpr, SCALES: tl.constexpr, LEADING: tl.constexpr,
    PARTS: tl.constexpr, STEPS: tl.constexpr, EXACT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y += R step(z), z = latent + bias: output_calibration.OutputCalibration.forward under each row's expert."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    part, b = tl.program_id(1), tl.program_id(2)
    t, k, m = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BL), tl.arange(0, BM)
    e = tl.load(experts + b)
    row = (b * T + t).to(tl.int64)[:, None]
    here = (t < T)[:, None]
    there = here & (k < L)[None, :]
    z = total(latent, row, k[None, :], there, rows, L, PARTS)
    z += tl.load(bias + k, mask=k < L, other=0.0)[None, :]
    step = tl.load(rest + e * L + k, mask=k < L, other=0.0)[None, :]
    step = step + z * tl.load(damping + k, mask=k < L, other=0.0)[None, :]
    kernels: tl.constexpr = SCALES * M
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
        step += tl.dot(weights, backs, input_precision=precision)
    step = tl.where(there, step, 0.0)
    for i in range(STEPS):
        j = (part * STEPS + i) * BD + tl.arange(0, BD)
        inside, place = here & (j < D)[None, :], row * D + j[None, :]
        rs = tl.load(reinjection + j[None, :] * L + k[:, None], mask=(k < L)[:, None] & (j < D)[None, :], other=0.0)
        old = tl.load(y + place, mask=inside, other=0.0)
        new = old.to(tl.float32) + tl.dot(step, rs, input_precision=precision)
        tl.store(y + place, new.to(old.dtype), mask=inside)
