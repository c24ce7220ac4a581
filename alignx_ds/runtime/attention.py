"""How attention is computed in training, and whether PyTorch's may be cuDNN's, on CUDA.

cuDNN plans its kernels anew for every shape: the first prefill of LLaMA-2-7B with a prompt of a new length takes 75 ms
with them and 35 ms without; later ones of that length take the same time. Where lengths vary, as in evaluation and
serving, they don't pay. In training they do: masked attention, forward and backward, takes 5.1 ms a layer instead of
11.0 for 22 lines of 1,024 tokens, after 118 ms for the plan (H200, torch 2.11; docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WIDTH_MULTIPLE = 64  # tokens; of the width of packed lines, so that few shapes occur


FLASH = "flash_attention_2"


def choose(model: Any, implementation: str) -> None:
    """Let a causal LM of transformers compute its attention in this way; "auto" changes nothing."""
    if implementation != "auto":
        model.set_attn_implementation(implementation)


def reads_one_line(model: Any) -> bool:
    """Whether packed rows have to be in a single line: flash attention tells them apart by their positions there alone.

    transformers' own masks, which SDPA and eager attention take, tell them apart in any number of lines.
    """
    return bool(model.config._attn_implementation == FLASH)


def avoid_planning() -> None:
    """Switch cuDNN's attention off in this process. Called wherever a model is loaded or is to decode."""
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def planning_pays() -> Iterator[None]:
    """Within it cuDNN's attention is on."""
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def width_multiple(device: torch.device) -> int:
    """The multiple to which packed lines are padded on this device. On a CPU there is nothing to plan."""
    return WIDTH_MULTIPLE if device.type == "cuda" else 1
