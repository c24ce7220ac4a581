"""The one place that imports DeepSpeed. Its import chooses the accelerator, so the environment is set first."""

from __future__ import annotations

import os
from typing import Any

import torch


def choose_accelerator() -> None:
    """Select the CPU where there is no GPU; unset, DeepSpeed prints a warning to stdout when it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # halves the time that deepspeed.initialize takes


def load_deepspeed() -> Any:
    """The module `deepspeed`, imported at the first call."""
    choose_accelerator()
    import deepspeed
    from deepspeed import ops

    # The shared-memory op is compiled at first use (40 s, needs g++) and serves only inference_all_reduce.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
