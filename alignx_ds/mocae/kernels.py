"""The top-1 mixture and its output calibration on CUDA: what PyTorch does in thirty small kernels, in six of Triton's.

A row's expert is looked up inside the kernels, so that nothing is gathered: not at prefill, and not while decoding.
Rounding follows PyTorch's own (pre-activations, activation and product in the model's dtype; sums in fp32).
Shapes: B rows, T tokens, d hidden, f FFN, S specialists, r rank, k latent, C kernels of all scales, P parts of a sum.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

try:
    import triton

    from alignx_ds.mocae import triton_kernels
except ImportError:  # torch for CPUs comes without Triton
    triton = None

ACTIVATIONS = {"SiLU": 1, "SiLUActivation": 1, "GELUTanh": 2, "PytorchGELUTanh": 2}  # by the name of their class
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 264  # of a kernel, that it takes to fill a card, about
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, to try the kernels


def serve(x: Tensor, gates: Tensor, count: int | None, activation: nn.Module) -> bool:
    """Whether these kernels can do it: one expert for all tokens of a row, and no gradient is asked for."""
    if triton is None or not (x.is_cuda or INTERPRETED) or torch.is_grad_enabled():
        return False
    here = INTERPRETED or x.device.index == torch.cuda.current_device()
    known = type(activation).__name__ in ACTIVATIONS and x.dtype in DTYPES
    return here and known and count == 1 and gates.shape[1] == 1


class Tables(NamedTuple):
    """What an output calibration does under each expert (output_calibration.Pull), stacked: [E, ...], fp32."""

    bias: Tensor  # [k]
    into: Tensor  # [E, l, C], of the l leading latent dimensions
    offset: Tensor  # [E, C]
    back: Tensor  # [E, C, k]
    rest: Tensor  # [E, k]
    damping: Tensor  # [k]
    scales: int


def _power(n: int, least: int = 16) -> int:
    """The power of two that covers n; a product of Triton's asks for 16."""
    return max(least, 1 << (n - 1).bit_length())


def _few(n: int) -> int:
    """The power of two below n, from 1 to 16: each number of parts is a kernel of its own, to be compiled."""
    return 1 << min(4, max(1, n).bit_length() - 1)


def _tokens(t: int) -> int:
    """Tokens of a tile."""
    return 64 if t > 256 else 16


def _exact(x: Tensor) -> bool:
    """Products in fp32; also where Triton's interpreter would multiply the bits of bf16."""
    return x.dtype == torch.float32 or INTERPRETED


def latent(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
    """x [B, T, n] through its rows' own maps -> fp32 [P, B T, groups r], whose parts add up.

    w is [groups, S, r, n] or [S, r, n] of the specialists, the generalist's rows get zeros; or [r, n] of every row.
    """
    b, t, n = x.shape
    groups, r = (w.shape[0] if w.dim() == 4 else 1), w.shape[-2]
    width, single = groups * r, t == 1
    wide = x.dtype == torch.float32 or w.dtype == torch.float32
    long, across = (b, w.shape[-3] if w.dim() > 2 else 1) if single else (t, b)
    bt, bn, bk = _tokens(t), min(128 if t > 256 else 32, _power(width)), 32 if wide else 64
    tiles = triton.cdiv(long, bt) * across * triton.cdiv(width, bn)
    parts = _few(min((2 if single else 1) * PROGRAMS // tiles, n // (2 * bk)))
    steps = triton.cdiv(triton.cdiv(n, parts), bk)  # of a part
    parts = triton.cdiv(n, steps * bk)
    out = torch.empty(parts, b * t, width, dtype=torch.float32, device=x.device)
    group_stride, expert_stride = (w.stride(0) if w.dim() == 4 else 0), (w.stride(-3) if w.dim() > 2 else 0)
    triton_kernels.latent[(triton.cdiv(long, bt), across * triton.cdiv(width, bn), parts)](
        x, w, experts, out, long, width, n, r, b * t, group_stride, expert_stride,
        STEPS=steps, FIRST=int(w.dim() > 2), SINGLE=single, EXACT=_exact(x), BT=bt, BN=bn, BK=bk,
    )  # fmt: skip
    return out


def mixture(x: Tensor, base: Any, stacks: Any, experts: Tensor) -> Tensor:
    """`FusedMixture` of one expert a row: x [B, T, d], experts [B] int32 -> [B, T, d]."""
    x = x.contiguous()
    b, t, _ = x.shape
    exact, kind, single = _exact(x), ACTIVATIONS[type(base.activation).__name__], t == 1
    long, across = (b, 1) if single else (t, b)  # of one token a row, the rows are a tile's tokens
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
    """`OutputCalibration` of one expert a row: y [B, T, d] -> [B, T, d]; projection [k, d], reinjection [d, k] fp32."""
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
    chunks = _few(triton.cdiv(t, bt) * b * triton.cdiv(d, bd) // PROGRAMS)
    triton_kernels.calibrate[(triton.cdiv(d, bd * chunks), triton.cdiv(t, bt), b)](
        *whole, reinjection, experts, t, d, latents, b * t, kernels,
        PRECISION="ieee" if _exact(y) else "tf32", BT=bt, BD=bd, CHUNKS=chunks, BM=_power(kernels), **shared,
    )  # fmt: skip
    return out
