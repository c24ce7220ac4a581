"""The measured rates of the card itself, in bytes and FLOPs per second."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from alignx_ds.training.speed import peak_flops
from suite.timing import milliseconds


def copy_rate(device: str) -> float:
    """GB/s of a copy that is larger than any cache; bytes read and bytes written both count."""
    size = 2**31 if device == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device) / 1e9


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of random matrices."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: a @ b, device) / 1e12


def nominal_rate() -> float | None:
    """TFLOP/s of dense bf16 that the vendor states for this card."""
    rate = peak_flops(torch.bfloat16)
    return rate and rate / 1e12


def _seconds(work: Callable[[], object], device: str, repeats: int = 10) -> float:
    times = [milliseconds(work, device) for _ in range(3 + repeats)]
    return statistics.median(times[3:]) / 1000
