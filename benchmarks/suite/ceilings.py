"""The measured rates of the card itself, in bytes and FLOPs per second."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from suite.timing import milliseconds

NOMINAL = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # TFLOP/s of dense bf16, as the vendor states it


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
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for card, rate in NOMINAL.items() if card in name), None)


def _seconds(work: Callable[[], object], device: str, repeats: int = 10) -> float:
    times = [milliseconds(work, device) for _ in range(3 + repeats)]
    return statistics.median(times[3:]) / 1000
