"""The one place that imports DeepSpeed. Its import chooses the accelerator, so the environment is set first."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alignx_ds.runtime import memory

COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"


def choose_accelerator() -> None:
    """Select the CPU where there is no GPU; unset, DeepSpeed prints a warning to stdout when it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # halves the time that deepspeed.initialize takes


def _set_cuda_variables() -> None:
    """Set what torch's allocator reads at the first allocation, and correct what DeepSpeed reads when it compiles."""
    # Batches differ in length. torch's default blocks become fragmented; expandable segments do not.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Images for Hopper name its architecture 9.0a. DeepSpeed 0.19 fails on the letter when it compiles an optimizer.
    if architectures := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = re.sub(r"(?<=\d)[a-z]+", "", architectures)


def load_deepspeed() -> Any:
    """The module `deepspeed`, imported at the first call."""
    choose_accelerator()
    if torch.cuda.is_available():
        _set_cuda_variables()
    import deepspeed
    from deepspeed import ops

    # The shared-memory op is compiled at first use (40 s, needs g++) and serves only inference_all_reduce.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    memory.caches_of(COORDINATOR)
    return deepspeed


@contextmanager
def without_warnings() -> Iterator[None]:
    """Within it DeepSpeed's log holds errors only."""
    logger = load_deepspeed().utils.logger
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def forget(model: nn.Module) -> None:
    """Remove what all engines of a process share from the model of an engine that is destroyed.

    DeepSpeed 0.19's `destroy` removes its hooks, but under ZeRO-3 two places still refer to the model, and so to the
    engine and the fp32 masters: the stack of modules in the forward pass, whose lowest is the whole model, and a cache
    of which parameters to release, whose keys are coordinators and modules.
    """
    from deepspeed.runtime.zero import parameter_offload

    own = set(model.modules())
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module not in own]
    for cache in memory.caches_of(COORDINATOR):
        cache.cache_clear()
