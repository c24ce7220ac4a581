"""Launches of Triton kernels that cost the host less than Triton's own."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, to test the kernels
ALIGNMENT = 16  # bytes; Triton compiles a kernel anew for pointers that are not multiples of it


class Kernel:
    """A Triton kernel, whose parameters are tensors, then counts, then constants, in this order."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], Any] = {}  # by device, warps, stages, constants and dtypes


class Launch:
    """A launch of a kernel, to be repeated with other tensors of the same dtypes.

    Triton looks at every argument of every launch to find the kernel that it compiled for them: 150 µs on a host on
    which PyTorch's own launches take 15. Here a few things are known: all sizes are constants but for the counts, which
    are 32-bit and not specialised, and PyTorch's allocator aligns tensors. So the kernel is looked up once.
    The kernel's launch hooks, which Triton's own profiler needs, are not called.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        counts: tuple[int, ...],
        warps: int = 4,
        stages: int = 3,
        **constants: int,
    ) -> None:
        """`constants` have the names and the order of the kernel's."""
        self._kernel, self._grid, self._warps, self._stages = kernel, grid, warps, stages
        self._counts, self._constants = counts, constants
        self._numbers = (*counts, *constants.values())
        self._found: dict[int, Any] = {}  # by device

    def __call__(self, *tensors: Tensor) -> None:
        """The tensors are on the current device."""
        if INTERPRETED or torch.compiler.is_compiling():
            self._kernel.kernel[self._grid](*tensors, *self._numbers)
            return
        pointers, misaligned = [], 0
        for tensor in tensors:
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            misaligned |= pointer
        device = tensors[0].get_device()
        known = self._found.get(device)
        if known is None or misaligned % ALIGNMENT:
            self._launch_by_triton(tensors, aligned=not misaligned % ALIGNMENT)
            return
        stream = triton.runtime.driver.active.get_current_stream(device)
        known.run(
            *self._grid, stream, known.function, known.packed_metadata, None, None, None, *pointers, *self._numbers
        )

    def _launch_by_triton(self, tensors: tuple[Tensor, ...], aligned: bool) -> None:
        device, kernel = tensors[0].get_device(), self._kernel
        key = (device, self._warps, self._stages, *self._constants.values(), *[tensor.dtype for tensor in tensors])
        if aligned and key in kernel.compiled:
            self._found[device] = kernel.compiled[key]
            return self(*tensors)
        names = kernel.kernel.arg_names
        assert list(self._constants) == names[-len(self._constants) :], "in the order of the kernel's"
        run = kernel.kernel[self._grid]
        try:
            made = run(*tensors, *self._counts, **self._constants, num_warps=self._warps, num_stages=self._stages)
        except OutOfResources:  # the card has less memory for a block's loops than those that this was tuned on
            made = run(*tensors, *self._counts, **self._constants, num_warps=self._warps, num_stages=1)
        if aligned:
            self._found[device] = kernel.compiled[key] = made
        return None
