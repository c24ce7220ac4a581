"""The top-1 mixture and its output calibration on CUDA, in a few Triton kernels instead of thirty of PyTorch.

With several tokens a row (prefill) they are four, with one (decoding) five. The kernels index the stacked factors by
each row's expert, so nothing is gathered. They round where PyTorch rounds: pre-activations, activation and product have
the model's dtype, sums are fp32.
Shapes: B rows, T tokens, d hidden, f FFN, S specialists, E experts, r rank, k latent, l leading latent dimensions,
C mean-shift kernels of all scales, P partial sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

try:
    import triton

    from alignx_ds.mocae import triton_kernels, triton_single
    from alignx_ds.mocae.triton_launch import INTERPRETED, Kernel, Launch
except ImportError:  # torch's CPU builds do not include Triton
    triton, INTERPRETED = None, False
else:
    LATENT, ACTIVATE, OUTWARD, CALIBRATE = (
        Kernel(getattr(triton_kernels, name)) for name in ("latent", "activate", "outward", "calibrate")
    )
    LATENT_1, ACTIVATE_1, OUTWARD_1, CALIBRATE_1 = (
        Kernel(getattr(triton_single, name)) for name in ("latent", "activate", "outward", "calibrate")
    )

ACTIVATIONS = {
    "SiLU": 1,
    "SiLUActivation": 1,
    "GELUTanh": 2,
    "PytorchGELUTanh": 2,
}  # by class name; the values are those of triton_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 264  # about as many of a kernel fill a card
PLANS = 128  # kept of each kind; one for every shape of a batch
Plan = TypeVar("Plan")


def supported(x: Tensor, gates: Tensor, count: int | None, activation: nn.Module) -> bool:
    """Whether the kernels can run: one expert for all tokens of a row, no gradients, known dtype and activation.

    x [B, T, d], gates [B, T or 1, E]; `count` is an upper bound of the non-zero gates per row.
    """
    if triton is None or not (x.is_cuda or INTERPRETED) or torch.is_grad_enabled():
        return False
    on_current_device = INTERPRETED or x.device.index == torch.cuda.current_device()
    known = type(activation).__name__ in ACTIVATIONS and x.dtype in DTYPES
    one_dtype = known and not torch.is_autocast_enabled(x.device.type)
    return on_current_device and one_dtype and count == 1 and gates.shape[1] == 1


class Rows:
    """The only expert of each row, [B] int32, and memory that the layers use one after the other.

    Made where `supported` says so, and kept with the KV cache: later layers and steps then ask `serve` alone.
    """

    def __init__(self, experts: Tensor) -> None:
        self.experts, self._device = experts, experts.device
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def serve(self, x: Tensor) -> bool:
        """Whether the kernels can also run for x, of the same model and batch."""
        plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled(self._device.type))
        return plain and x.device == self._device

    def buffer(self, use: str, shape: tuple[int, ...]) -> Tensor:
        """[*shape] fp32 for partial sums, with any values."""
        if torch.compiler.is_compiling():
            return torch.empty(shape, dtype=torch.float32, device=self._device)
        if (use, shape) not in self._buffers:
            self._buffers[use, shape] = torch.empty(shape, dtype=torch.float32, device=self._device)
        return self._buffers[use, shape]


class Unfinished(NamedTuple):
    """A mixture's output without the experts' own part of its down projection, which the calibration's kernels add."""

    y: Tensor  # [B, T, d], overwritten when it is finished
    latent: Tensor  # [P, B T, r] fp32, the sum over P is the input of `up`; the next layer overwrites it
    up: Tensor  # [S, r, d]
    rows: Rows


class Tables(NamedTuple):
    """The parts of an output calibration's step (output_calibration.GatedStep) under each expert, fp32."""

    bias: Tensor  # [k]
    into: Tensor  # [E, l, C]
    offset: Tensor  # [E, C]
    back: Tensor  # [E, C, k]
    rest: Tensor  # [E, k]
    damping: Tensor  # [k]
    scales: int


def mixture(x: Tensor, base: Any, stacks: Any, rows: Rows) -> Unfinished:
    """`FusedMixture` with one expert per row: x [B, T, d].

    `base` is the base FFN (experts.FeedForward); `stacks` has the factors (fused.FusedMixture).
    """
    x = x.contiguous()
    b, t, d = x.shape
    up_in, experts = stacks.up_in, rows.experts
    _, s, r, f = up_in.shape
    plan = _planned(_mixture, _mixture_kept)(
        b, t, d, f, s, r, ACTIVATIONS[type(base.activation).__name__], x.dtype, up_in.dtype
    )
    inner = rows.buffer("inner", plan.inner)
    plan.latent(x, stacks.down_in, experts, inner)
    act, up = base.gate(x), base.up(x)
    outer = rows.buffer("outer", plan.outer)
    if plan.outward is None:
        plan.activate(act, up, inner, up_in, stacks.down_out, experts, outer)
    else:
        plan.activate(act, up, inner, up_in, experts)
        plan.outward(act, stacks.down_out, experts, outer)
    return Unfinished(base.down(act), outer, stacks.up_out, rows)


def finished(u: Unfinished) -> Tensor:
    """The mixture's output y [B, T, d], where no calibration follows."""
    (b, t, d), (s, r, _) = u.y.shape, u.up.shape
    launch, shape = _planned(_outward, _outward_kept)(b, t, d, s, r, u.latent.shape[0], 0, u.y.dtype, u.up.dtype)
    launch(u.y, u.latent, u.up, u.y, u.rows.experts, u.rows.buffer("projected", shape))
    return u.y


def calibrate(u: Unfinished, projection: Tensor, reinjection: Tensor, tables: Tables) -> Tensor:
    """`OutputCalibration` of the finished output with one expert per row -> [B, T, d] in the dtype of u.y.

    projection [k, d] and reinjection [d, k] are fp32.
    """
    y, latent, up, rows = u
    (b, t, d), (s, r, _), experts = y.shape, up.shape, rows.experts
    _, leading, kernels = tables.into.shape
    outward, shape, step = _planned(_calibration, _calibration_kept)(
        b, t, d, s, r, latent.shape[0], projection.shape[0], kernels, tables.scales, leading, y.dtype, up.dtype
    )
    inner = rows.buffer("projected", shape)
    outward(y, latent, up, projection, experts, inner)
    step(y, inner, *tables[:-1], reinjection, experts)
    return y


def _planned(plan: Callable[..., Plan], kept: Callable[..., Plan]) -> Callable[..., Plan]:
    """`kept`, which remembers what it planned for a shape, but `plan` itself within a step that is compiled."""
    return plan if torch.compiler.is_compiling() else kept


class MixturePlan(NamedTuple):
    """The launches of `mixture`, and the shapes of its partial sums."""

    latent: Launch
    inner: tuple[int, int, int]
    activate: Launch
    outward: Launch | None  # the latent of `down`, which `activate` computes itself for several tokens a row
    outer: tuple[int, int, int]


def _mixture(
    b: int, t: int, d: int, f: int, s: int, r: int, kind: int, dtype: torch.dtype, weights: torch.dtype
) -> MixturePlan:
    """`weights` is the factors' dtype, x has `dtype`. A launch serves one combination of dtypes."""
    exact, br = _exact(dtype), _power(r)
    if t == 1:
        latent, inner = _latent_single(b, d, s, r, 2, dtype)
        outward, outer = _latent_single(b, f, s, r, 1, dtype)
        activate = Launch(
            ACTIVATE_1, (-(-f // 64), -(-b // 16), 1), (b,),
            S=s, R=r, F=f, PARTS=inner[0], KIND=kind, EXACT=exact, BT=16, BF=64, BR=br,
        )  # fmt: skip
        return MixturePlan(latent, inner, activate, outward, outer)
    bt, counts = _tile(b, t, r, exact), (t, b * t)
    tiles = -(-t // bt)
    bn, bk = min(128, _power(2 * r)), _block(dtype)
    columns = -(-2 * r // bn)
    inner_parts, steps = _split(d, bk, tiles * b * columns, most=8)
    latent = Launch(
        LATENT, (tiles, b * columns, inner_parts), counts,
        GROUPS=2, S=s, R=r, K=d, STEPS=steps, EXACT=exact, BT=bt, BN=bn, BK=bk,
    )  # fmt: skip
    bf = 64 if br <= 128 else 32
    parts, steps = _split(f, bf, tiles * b)
    activate = Launch(
        ACTIVATE, (tiles, parts, b), counts,
        S=s, R=r, F=f, PARTS=inner_parts, STEPS=steps, KIND=kind, EXACT=exact, BT=bt, BF=bf, BR=br,
    )  # fmt: skip
    return MixturePlan(latent, (inner_parts, b * t, 2 * r), activate, None, (parts, b * t, r))


def _latent_single(
    b: int, n: int, s: int, r: int, groups: int, dtype: torch.dtype
) -> tuple[Launch, tuple[int, int, int]]:
    """x [B, 1, n], w [groups, S, r, n] or [S, r, n] -> x wᵀ with each row's own w, as partial sums [P, B, groups r]."""
    bt, bn, bk = 16, min(32, _power(groups * r)), _block(dtype)
    rows, columns = -(-b // bt), s * -(-groups * r // bn)
    parts, steps = _split(n, bk, -(-rows * columns // 2))
    launch = Launch(
        LATENT_1, (rows, columns, parts), (b,),
        GROUPS=groups, S=s, R=r, K=n, STEPS=steps, EXACT=_exact(dtype), BT=bt, BN=bn, BK=bk,
    )  # fmt: skip
    return launch, (parts, b, groups * r)


def _outward(
    b: int, t: int, d: int, s: int, r: int, parts: int, k: int, dtype: torch.dtype, weights: torch.dtype
) -> tuple[Launch, tuple[int, int, int]]:
    """Finishes y and projects it to k, as partial sums of the shape that is returned; only finishes it for k 0."""
    exact, sizes, bd = _exact(dtype), {"R": r, "D": d, "L": k, "PARTS": parts}, 64
    blocks = {"BD": bd, "BR": _power(r), "BL": _power(k) if k else 16}
    if t == 1:
        made = -(-d // bd)
        grid = (made, -(-b // 16), 1)
        return Launch(OUTWARD_1, grid, (b,), S=s, **sizes, EXACT=exact, BT=16, **blocks), (made, b, k)
    bt = _tile(b, t, r, exact)
    tiles = -(-t // bt)
    made, steps = _split(d, bd, tiles * b)
    launch = Launch(OUTWARD, (tiles, made, b), (t, b * t), stages=2, **sizes, STEPS=steps, EXACT=exact, BT=bt, **blocks)
    return launch, (made, b * t, k)


def _calibration(
    b: int, t: int, d: int, s: int, r: int, parts: int, k: int, kernels: int, scales: int, leading: int,
    dtype: torch.dtype, weights: torch.dtype,
) -> tuple[Launch, tuple[int, int, int], Launch]:  # fmt: skip
    """The two launches of `calibrate`, and the shape of the partial sums between them."""
    outward, shape = _outward(b, t, d, s, r, parts, k, dtype, weights)
    m, made = kernels // scales, shape[0]
    sizes = {"D": d, "L": k, "M": m, "SCALES": scales, "LEADING": leading, "PARTS": made}
    bd, bl, bm = 64, _power(k), _power(m)
    if t == 1:
        tail = {"BD": bd, "BL": bl, "BM": bm, "BS": _power(scales, 1), "BP": _power(made, 1)}
        return outward, shape, Launch(CALIBRATE_1, (-(-d // bd), b, 1), (b,), **sizes, **tail)
    exact = _exact(dtype)
    bt = _tile(b, t, k, exact)
    tiles = -(-t // bt)
    divided, steps = _split(d, bd, tiles * b)
    step = Launch(
        CALIBRATE, (tiles, divided, b), (t, b * t),
        **sizes, STEPS=steps, EXACT=exact, BT=bt, BD=bd, BL=bl, BM=bm,
    )  # fmt: skip
    return outward, shape, step


_mixture_kept = lru_cache(maxsize=PLANS)(_mixture)
_outward_kept = lru_cache(maxsize=PLANS)(_outward)
_calibration_kept = lru_cache(maxsize=PLANS)(_calibration)


def _power(n: int, least: int = 16) -> int:
    """The least power of two that is at least n and `least`; Triton's dot needs 16."""
    return max(least, 1 << (n - 1).bit_length())


def _split(size: int, block: int, tiles: int, most: int = 16) -> tuple[int, int]:
    """Into how many parts each of `tiles` programs divides its loop over `size`, and the blocks of a part.

    A kernel is compiled anew for each number of parts, so these are powers of two.
    """
    parts = 1 << (min(most, max(1, PROGRAMS // tiles), max(1, size // (2 * block))).bit_length() - 1)
    steps = -(-size // (parts * block))
    return -(-size // (steps * block)), steps


def _tile(b: int, t: int, rank: int, exact: bool) -> int:
    """The number of tokens in a tile of a kernel for several tokens a row.

    With four warps, 64 is the best on an H200 at rank 64, or within 6 % of it, from 1 x 512 to 8 x 2,048 tokens.
    """
    if t <= 16:
        return 16
    return 32 if t <= 32 or b * t < 512 or rank > 64 or exact else 64


def _block(dtype: torch.dtype) -> int:
    """The length of a step of the loops over x."""
    return 32 if dtype == torch.float32 else 64


def _exact(dtype: torch.dtype) -> bool:
    """Whether products are computed in fp32. Triton's interpreter needs that for bf16, whose bits it would multiply."""
    return dtype == torch.float32 or INTERPRETED
