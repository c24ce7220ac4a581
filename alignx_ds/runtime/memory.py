"""The memory of this process, and of models and engines that have ended."""

from __future__ import annotations

import gc
import os
import resource
import sys
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")
RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # as torchrun, DeepSpeed and MPI say it
CACHE = type(lru_cache(lambda: None))


def free() -> None:
    """Free what nobody refers to any more but itself, and return the GPU's share of it to the device.

    An engine and its model are full of circular references, which Python by itself looks for too rarely among objects
    that have lived long. The second pass is for parameters: a tensor that a layer has kept, such as its gates, holds a
    graph that refers to them where the first pass does not see it.
    """
    for _ in range(2):
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak() -> int:
    """The most bytes that this process has held: those that torch has allocated on the GPU, or without one, its RSS."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def available(here: int | None = None) -> int:
    """About how many bytes a rank may hold: its GPU's memory, or without one, what is the least of its share of the
    machine's, of its control group's and of what its limit on address space leaves.

    The launcher says how many ranks share the machine; where it does not, `here` do, or one.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    ranks = int(next((os.environ[name] for name in RANKS_HERE if os.environ.get(name)), here or 1))
    limits = [psutil.virtual_memory().total // ranks]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        used: int = psutil.Process().memory_info().vms
        limits.append(max(0, most - used))
    with suppress(OSError, ValueError):  # "max" is no number
        limits.append(int(CONTROL_GROUP.read_text()) // ranks)
    least: int = min(limits)
    return least


@cache
def caches_of(module: str) -> list[Any]:
    """The `functools.lru_cache`s of the functions and methods of this module, wherever a decorator hides them.

    To be called for the first time after the module's import and before `keep`.
    """
    return [found for found in gc.get_objects() if type(found) is CACHE and found.__module__ == module]


def keep() -> None:
    """Exclude all that there is now, such as imported modules, from the search for what can be freed.

    DeepSpeed and its engines' ends search several times a job; among a million objects that takes half a second each.
    """
    gc.freeze()
