"""All examinations of `alignx-ds doctor`, in the order of its report. They leave no file behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from alignx_ds.doctor import hardware, software
from alignx_ds.doctor import ranks as doctor_ranks
from alignx_ds.doctor.findings import Finding

START_LIMIT, STEP_LIMIT = 90.0, 30.0  # seconds; the first step imports torch and deepspeed


def examine(directory: Path) -> Iterator[Finding]:
    yield from software.versions()
    if find_spec("deepspeed") is not None:
        yield from _training()
    yield hardware.cores()
    yield hardware.disk(directory)
    yield hardware.port()
    yield hardware.shared_memory()
    yield hardware.open_files()
    yield from software.environment()


def _training() -> Iterator[Finding]:
    yield from software.mpi()
    yield from hardware.accelerator()
    for backend in ("gloo", "nccl") if torch.cuda.device_count() > 1 else ("gloo",):
        yield from ranks(backend)
    yield from software.launchers()


def ranks(backend: str, start_limit: float = START_LIMIT, step_limit: float = STEP_LIMIT) -> Iterator[Finding]:
    """Two real ranks on this machine; a row for each step, up to the first that fails."""
    for step in doctor_ranks.attempt(backend, start_limit, step_limit):
        what = f"2 ranks on {backend}: {step.name}"
        if step.problem:
            yield Finding(what, "fail", step.problem, _fix_of_ranks(backend))
        else:
            yield Finding(what, "ok", f"{step.seconds:.2f} s")


def _fix_of_ranks(backend: str) -> str:
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    name = os.environ.get(variable, "")
    if name and name.lstrip("^=").split(",")[0] not in (own for _, own in socket.if_nameindex()):
        return f"unset {variable}, or name an interface of this machine: {_interfaces()}"
    if backend == "nccl":
        return "set NCCL_DEBUG=INFO for NCCL's log, then try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 to narrow it down"
    return (
        f"make this machine reachable from itself: loopback up (ip link), no firewall on it, correct or no {variable}"
    )


def _interfaces() -> str:
    return ", ".join(name for _, name in socket.if_nameindex())
