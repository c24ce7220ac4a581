"""Communication between ranks: cost of messages, collectives that DeepSpeed calls, bytes that Dispatch sends."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alignx_ds.mocae.parallel import Dispatch
from suite.costs import ALL_REDUCE, ALL_TO_ALL, Traffic, dispatched_bytes

SIZES = [4**k * 1024 for k in range(8)]  # 1 KiB to 16 MiB
Measured = dict[str, list[tuple[int, float]]]  # by kind: (bytes, seconds)


def microbenchmark(device: torch.device, repeats: int) -> Measured:
    """Seconds of a call by message size, on the group of all ranks: of the slowest rank, in the best round."""
    import torch.distributed as dist

    found: Measured = {ALL_TO_ALL: [], ALL_REDUCE: []}
    for size in SIZES:
        sent = torch.ones(size // 4, device=device)
        got = torch.empty_like(sent)
        for kind, call in (
            (ALL_TO_ALL, lambda got=got, sent=sent: dist.all_to_all_single(got, sent)),
            (ALL_REDUCE, lambda sent=sent: dist.all_reduce(sent, op=dist.ReduceOp.MAX)),
        ):
            seconds = torch.tensor([_seconds(call, device) for _ in range(2 + repeats)][2:], device=device)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            found[kind].append((size, float(seconds.min())))
    return found


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    import torch.distributed as dist

    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# By function: its kind, and its cost relative to an all-reduce, which is a reduce-scatter and an all-gather.
HALVES = ("reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
WEIGHTS = {
    "all_to_all_single": (ALL_TO_ALL, 1.0),
    "all_reduce": (ALL_REDUCE, 1.0),
    **dict.fromkeys(HALVES, (ALL_REDUCE, 0.5)),
}


@dataclass
class Tally:
    """Calls and bytes of this rank by kind; groups of one rank are left out."""

    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys((ALL_TO_ALL, ALL_REDUCE), 0))
    size: dict[str, float] = field(default_factory=lambda: dict.fromkeys((ALL_TO_ALL, ALL_REDUCE), 0.0))
    inside: bool = False  # DeepSpeed's functions call torch's: each call is counted once

    def count(self, name: str, arguments: list[Any]) -> None:
        import torch.distributed as dist

        group = next((a for a in arguments if isinstance(a, dist.ProcessGroup)), None)
        if dist.get_world_size(group) > 1:
            kind, weight = WEIGHTS[name]
            self.calls[kind] += 1
            self.size[kind] += weight * max(_bytes(a) for a in arguments)

    def traffic(self) -> dict[str, Traffic]:
        return {kind: Traffic(self.calls[kind], self.size[kind]) for kind in self.calls}


def _bytes(argument: Any) -> int:
    """Of a tensor or a list of tensors. A collective's largest argument has the data of all its ranks."""
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list) else 0


@contextmanager
def listening() -> Iterator[Tally]:
    """Counts every collective that DeepSpeed or the training loop calls in the block. Not for timed steps."""
    import deepspeed.comm.comm
    import torch.distributed

    tally, before = Tally(), []

    def listener(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            if tally.inside:
                return function(*arguments, **options)
            tally.inside = True
            try:
                tally.count(name, [*arguments, *options.values()])
                return function(*arguments, **options)
            finally:
                tally.inside = False

        return counted

    # DeepSpeed's functions call each other in comm.comm, and there torch's by references that were taken at the start.
    for module in (deepspeed.comm, deepspeed.comm.comm, torch.distributed):
        for name in WEIGHTS:
            if hasattr(module, name):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, listener(name, getattr(module, name)))
    try:
        yield tally
    finally:
        for module, name, function in before:
            setattr(module, name, function)


@dataclass
class Dispatched:
    """What the Dispatch modules have sent in one pass."""

    size: int = 0  # bytes, forward and backward
    capacities: list[int] = field(default_factory=list)  # of each layer
    padding: list[float] = field(default_factory=list)  # share of each layer's slots that hold no token


@contextmanager
def watching(model: nn.Module) -> Iterator[Dispatched]:
    """Counts from the routes of every Dispatch. An input without gradient saves a message in the backward pass."""
    seen = Dispatched()

    def hook(dispatch: nn.Module, arguments: tuple[Any, ...], routes: tuple[Any, ...]) -> None:
        assert isinstance(dispatch, Dispatch)
        x, capacity, experts = arguments[0], routes[1], routes[2]
        directions = 2 + (2 if x.requires_grad else 1) * torch.is_grad_enabled()
        seen.size += dispatched_bytes(capacity, experts, x.shape[-1], x.element_size(), directions)
        seen.capacities.append(capacity)
        seen.padding.append(dispatch.padding_fraction)

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, Dispatch)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
