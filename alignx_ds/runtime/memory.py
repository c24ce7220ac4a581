"""The memory of this process, and of models and engines that have ended."""

from __future__ import annotations

import gc
import resource
import sys
from functools import lru_cache

import torch

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
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def clear_caches(module: str) -> None:
    """Empty the `functools.lru_cache`s of the functions and methods of this module, wherever a decorator hides them."""
    for found in gc.get_objects():
        if type(found) is CACHE and found.__module__ == module:
            found.cache_clear()
