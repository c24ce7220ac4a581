"""Whether a layer runs for the second time: under activation checkpointing, in the backward pass.

Both runs have to make the same operations. But what a layer leaves behind for the losses (a gate's decision, a drift, a
fusion's logits) is that of the first run: the loss has read it, and the second one's would keep its activations alive.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)  # the backward pass may have its own thread
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def is_recomputing() -> bool:
    """Whether this is the second run of a layer."""
    return _RECOMPUTING.get()


class Recomputation:
    """What surrounds a layer's second run. `is_current`: whether its inputs beside x are still those of the first."""

    def __init__(self, is_current: Callable[[], bool]) -> None:
        self._is_current = is_current
        self._token: Token[bool] | None = None

    def __enter__(self) -> None:
        assert self._is_current(), "the backward pass comes before the model's next forward pass"
        self._token = _RECOMPUTING.set(True)

    def __exit__(self, *raised: object) -> None:
        assert self._token is not None
        _RECOMPUTING.reset(self._token)


def contexts(is_current: Callable[[], bool] = lambda: True) -> Contexts:
    """For torch.utils.checkpoint's `context_fn`: what surrounds a layer's first run, and its second."""
    return nullcontext(), Recomputation(is_current)
