"""Rows of one expert each on a CPU, in the order of their experts: an expert's factors multiply its own rows alone.

In the stacks of the fused path every row is multiplied with the factors of all experts. What both cost is in
docs/performance.md. Shapes: B rows, T tokens, d hidden size, E experts; a specialist is an expert less the generalist.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """The rows of every expert, in a batch whose rows have one expert each."""

    order: Tensor | None  # [B] int64, the rows by expert; None where they are in this order already
    back: Tensor | None  # [B] int64, the inverse
    parts: list[tuple[int, int, int]]  # in that order: a specialist, its first row and the one after its last

    @classmethod
    def of(cls, gates: Tensor) -> Groups:
        """Of gates [B, 1, E], of which one per row is not zero. The host waits for the device."""
        experts = gates.squeeze(1).abs().argmax(-1)
        counts = torch.bincount(experts, minlength=gates.shape[-1]).tolist()
        ends = accumulate(counts)
        parts = [(e - 1, end - n, end) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if e and n]
        if bool((experts.diff() >= 0).all()):
            return cls(None, None, parts)
        order = experts.argsort(stable=True)
        return cls(order, order.argsort(), parts)

    def serve(self, x: Tensor) -> bool:
        """Whether they also serve x, of the same model and batch."""
        return _served_on_cpu(x)


def groupable(x: Tensor, gates: Tensor, count: int | None) -> bool:
    """Whether rows can be grouped here: x [B, T, d], gates [B, 1 or T, E], at most `count` of them not zero per row.

    On other devices the host would have to wait for the gates.
    """
    return count == 1 and gates.shape[1] == 1 and _served_on_cpu(x)


def _served_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def grouped_mixture(x: Tensor, base: Any, stacks: Any, groups: Groups) -> Tensor:
    """`FusedMixture` with one expert per row: x [B, T, d] -> [B, T, d].

    `base` is the base FFN (experts.FeedForward); `stacks` has the factors (fused.FusedMixture).
    """
    ordered = x if groups.order is None else x.index_select(0, groups.order)
    flat = ordered.flatten(0, 1)
    gate, up = base.gate(flat), base.up(flat)
    for s, own in _tokens(groups, x.shape[1]):
        for p, shared in enumerate((gate, up)):
            shared[own].addmm_(flat[own] @ stacks.down_in[p, s].mT, stacks.up_in[p, s])
    act = base.activation(gate).mul_(up)
    out: Tensor = base.down(act)
    for s, own in _tokens(groups, x.shape[1]):
        out[own].addmm_(act[own] @ stacks.down_out[s].mT, stacks.up_out[s])
    y = out.view_as(x)
    return y if groups.back is None else y.index_select(0, groups.back)


def _tokens(groups: Groups, length: int) -> Iterator[tuple[int, slice]]:
    """Each specialist with its tokens' places, in rows of this length."""
    for specialist, first, end in groups.parts:
        yield specialist, slice(first * length, end * length)
