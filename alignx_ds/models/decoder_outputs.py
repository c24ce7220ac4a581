"""What a decoder layer hands on, to be read or changed.

Shapes: B rows, T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def hidden_of(output: Any) -> Tensor:
    """The hidden states [B, T, d] in what a decoder layer returns: alone, or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def changed_output(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, the layer hands on `change` of its hidden states [B, T, d]."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        changed = change(hidden_of(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
