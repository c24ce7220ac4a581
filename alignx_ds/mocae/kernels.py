"""The top-1 mixture and its output calibration on CUDA, in six Triton kernels instead of thirty of PyTorch.

The kernels index the stacked factors by each row's expert, so nothing is gathered, neither at prefill nor in decoding.
They round where PyTorch rounds: pre-activations, activation and product have the model's dtype, sums are fp32.
Shapes: B rows, T tokens, d hidden, f FFN, S specialists, E experts, r rank, k latent, l leading latent dimensions,
C mean-shift kernels of all scales, P partial sums.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

try:
    import triton

    from alignx_ds.mocae import triton_kernels
except ImportError:  # torch's CPU builds do not include Triton
    triton = None

ACTIVATIONS = {
    "SiLU": 1,
    "SiLUActivation": 1,
    "GELUTanh": 2,
    "PytorchGELUTanh": 2,
}  # by class name; the values are those of triton_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 264  # about as many of a kernel fill a card
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, to test the kernels


def supported(x: Tensor, gates: Tensor, count: int | None, activation: nn.Module) -> bool:
    """Whether the kernels can run: one expert for all tokens of a row, no gradients, known dtype and activation.

    x [B, T, d], gates [B, T or 1, E]; `count` is an upper bound of the non-zero gates per row.
    """
    if triton is None or not (x.is_cuda or INTERPRETED) or torch.is_grad_enabled():
        return False
    on_current_device = INTERPRETED or x.device.index == torch.cuda.current_device()
    known = type(activation).__name__ in ACTIVATIONS and x.dtype in DTYPES
    return on_current_device and known and count == 1 and gates.shape[1] == 1


class Tables(NamedTuple):
    """The parts of an output calibration's step (output_calibration.GatedStep) under each expert, fp32."""

    bias: Tensor  # [k]
    into: Tensor  # [E, l, C]
    offset: Tensor  # [E, C]
    back: Tensor  # [E, C, k]
    rest: Tensor  # [E, k]
    damping: Tensor  # [k]
    scales: int


def _power(n: int, least: int = 16) -> int:
    """The least power of two that is at least n and `least`; Triton's dot needs 16."""
    return max(least, 1 << (n - 1).bit_length())


def _rounded_down(n: int) -> int:
    """n rounded down to a power of two from 1 to 16, because a kernel is compiled anew for each number of parts."""
    return 1 << min(4, max(1, n).bit_length() - 1)


def _tokens(t: int) -> int:
    """The number of tokens in a tile."""
    return 64 if t > 256 else 16


def _exact(x: Tensor) -> bool:
    """Whether products are computed in fp32. Triton's interpreter needs that for bf16, whose bits it would multiply."""
    return x.dtype == torch.float32 or INTERPRETED


def latent(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
    """x [B, T, n], experts [B] int32 -> x wᵀ with each row's own w, as partial sums [P, B T, groups r] fp32.

    w is [groups, S, r, n] or [S, r, n] with a map per specialist, and rows of the generalist get zeros; or it is [r, n]
    for all rows.
    """
    b, t, n = x.shape
    groups, r = (w.shape[0] if w.dim() == 4 else 1), w.shape[-2]
    width, single = groups * r, t == 1
    wide = x.dtype == torch.float32 or w.dtype == torch.float32
    long, across = (b, w.shape[-3] if w.dim() > 2 else 1) if single else (t, b)
    bt, bn, bk = _tokens(t), min(128 if t > 256 else 32, _power(width)), 32 if wide else 64
    tiles = triton.cdiv(long, bt) * across * triton.cdiv(width, bn)
    parts = _rounded_down(min((2 if single else 1) * PROGRAMS // tiles, n // (2 * bk)))
    steps = triton.cdiv(triton.cdiv(n, parts), bk)  # per part
    parts = triton.cdiv(n, steps * bk)
    out = torch.empty(parts, b * t, width, dtype=torch.float32, device=x.device)
    group_stride, expert_stride = (w.stride(0) if w.dim() == 4 else 0), (w.stride(-3) if w.dim() > 2 else 0)
    triton_kernels.latent[(triton.cdiv(long, bt), across * triton.cdiv(width, bn), parts)](
        x, w, experts, out, long, width, n, r, b * t, group_stride, expert_stride,
        STEPS=steps, FIRST=int(w.dim() > 2), SINGLE=single, EXACT=_exact(x), BT=bt, BN=bn, BK=bk,
    )  # fmt: skip
    return out


def mixture(x: Tensor, base: Any, stacks: Any, experts: Tensor) -> Tensor:
    """`FusedMixture` with one expert per row: x [B, T, d], experts [B] int32 -> [B, T, d] in the dtype of x.

    `base` is the base FFN (experts.FeedForward); `stacks` has the factors (fused.FusedMixture).
    """
    x = x.contiguous()
    b, t, _ = x.shape
    exact, kind, single = _exact(x), ACTIVATIONS[type(base.activation).__name__], t == 1
    long, across = (b, 1) if single else (t, b)  # with one token per row, a tile covers several rows
    specialists, r, f = stacks.up_in.shape[1:]
    bt, bf = _tokens(t), 64
    inner = latent(x, stacks.down_in, experts)
    act, up = base.gate(x), base.up(x)
    triton_kernels.activate[(triton.cdiv(f, bf), triton.cdiv(long, bt), across)](
        act, up, inner, stacks.up_in, experts, long, f, r, b * t,
        S=specialists, PARTS=inner.shape[0], KIND=kind, SINGLE=single, EXACT=exact, BT=bt, BF=bf, BR=_power(r),
    )  # fmt: skip
    outer = latent(act, stacks.down_out, experts)
    y: Tensor = base.down(act)
    _, r, d = stacks.up_out.shape
    triton_kernels.outward[(triton.cdiv(d, bf), triton.cdiv(long, bt), across)](
        y, outer, stacks.up_out, experts, long, d, r, b * t,
        S=specialists, PARTS=outer.shape[0], SINGLE=single, EXACT=exact, BT=bt, BD=bf, BR=_power(r),
    )  # fmt: skip
    return y


def calibrate(y: Tensor, projection: Tensor, reinjection: Tensor, tables: Tables, experts: Tensor) -> Tensor:
    """`OutputCalibration` with one expert per row: y [B, T, d], experts [B] int32 -> [B, T, d] in the dtype of y.

    projection [k, d] and reinjection [d, k] are fp32.
    """
    y = y.contiguous()
    b, t, d = y.shape
    inner, out = latent(y, projection, experts), torch.empty_like(y)
    latents, kernels = projection.shape[0], tables.offset.shape[1] // tables.scales
    whole = (y, out, inner, tables.bias, tables.into, tables.offset, tables.back, tables.rest, tables.damping)
    shared = {"PARTS": inner.shape[0], "SCALES": tables.scales, "LEADING": tables.into.shape[1], "BL": _power(latents)}
    if t == 1:
        triton_kernels.calibrate_single[(triton.cdiv(d, 64), b)](
            *whole, reinjection, experts, d, latents, b, kernels,
            BD=64, BM=_power(kernels), BS=_power(tables.scales, 1), BP=_power(inner.shape[0], 1), **shared,
        )  # fmt: skip
        return out
    bt, bd = _tokens(t), 64
    chunks = _rounded_down(triton.cdiv(t, bt) * b * triton.cdiv(d, bd) // PROGRAMS)
    triton_kernels.calibrate[(triton.cdiv(d, bd * chunks), triton.cdiv(t, bt), b)](
        *whole, reinjection, experts, t, d, latents, b * t, kernels,
        PRECISION="ieee" if _exact(y) else "tf32", BT=bt, BD=bd, CHUNKS=chunks, BM=_power(kernels), **shared,
    )  # fmt: skip
    return out
