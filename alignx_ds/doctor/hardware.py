"""Examine the machine: accelerator, cores, disk, the rendezvous port, shared memory, limits."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from alignx_ds.doctor.findings import GIB, Finding, Grade
from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed

RENDEZVOUS_PORT = 29500  # the launchers' default
LARGEST_PORT = 2**16 - 1
DISK_LEAST, DISK_GOOD = 1 * GIB, 10 * GIB
SHARED_MEMORY = 1 * GIB
OPEN_FILES = 1024


def accelerator() -> Iterator[Finding]:
    chosen = load_deepspeed().accelerator.get_accelerator()
    name = chosen.device_name()
    count = torch.cuda.device_count()
    if name != "cuda" and (count or Path("/proc/driver/nvidia/version").exists()):
        fix = "unset DS_ACCELERATOR" if count else "install a torch built for CUDA, and a driver that fits it"
        yield Finding("accelerator", "warn", f"{name}, though the machine has a GPU", fix)
        return
    bf16 = bool(chosen.is_bf16_supported())
    kind = f"{name}, {count} devices" if count else f"{name}, no GPU"
    fix = "" if bf16 else "set model.dtype=float32: bfloat16 is not supported here"
    yield Finding("accelerator", "ok" if bf16 else "warn", f"{kind}, bfloat16 {'yes' if bf16 else 'no'}", fix)
    for device in range(count):
        free, total = torch.cuda.mem_get_info(device)
        seen = f"{torch.cuda.get_device_name(device)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        crowded = free < total / 2
        fix = "another process uses it (see nvidia-smi); end it, or exclude the device with CUDA_VISIBLE_DEVICES"
        yield Finding(f"cuda:{device}", "warn" if crowded else "ok", seen, fix if crowded else "")


def cores() -> Finding:
    available = len(os.sched_getaffinity(0))
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not given:
        return Finding("cores", "ok", f"{available}; OMP_NUM_THREADS is not set, so `run` and launch/*.sh set it")
    wrong = not given.isdigit() or not 0 < int(given) <= available
    fix = f"set OMP_NUM_THREADS to cores / ranks, here at most {available}: more threads make a run many times slower"
    return Finding("cores", "warn" if wrong else "ok", f"{available}, OMP_NUM_THREADS={given}", fix if wrong else "")


def disk(directory: Path) -> Finding:
    """Free space, and a real write, in the directory or in the nearest of its parents that exists."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    what = f"disk at {directory}"
    fix = "choose another directory (output=DIRECTORY)"
    if not place.is_dir():
        return Finding(what, "fail", f"{place} is a file", fix)
    try:
        with tempfile.TemporaryFile(dir=place) as file:  # it has no name, so nothing is left behind
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "free some space, or " if error.errno == errno.ENOSPC else "make it writable, or "
        return Finding(what, "fail", f"can't write to {place}: {error.strerror}", remedy + fix)
    free = shutil.disk_usage(place).free
    grade: Grade = "ok" if free > DISK_GOOD else "warn" if free > DISK_LEAST else "fail"
    size = f"{free / GIB:,.1f} GiB free"
    return Finding(what, grade, size, "" if grade == "ok" else f"free some space, or {fix}")


def port() -> Finding:
    """The launchers' rendezvous port. `alignx-ds run` without a launcher picks a free one."""
    free = distributed.free_port()
    given = os.environ.get("MASTER_PORT", str(RENDEZVOUS_PORT))
    if not given.isdigit() or not 0 < int(given) <= LARGEST_PORT:
        return Finding("MASTER_PORT", "fail", f"{given!r} is no port number", f"unset it, or set MASTER_PORT={free}")
    chosen = int(given)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", chosen))
        except OSError as error:
            fix = f"another job may use it; set MASTER_PORT={free} for a launcher"
            return Finding(f"port {chosen}", "warn", str(error.strerror), fix)
    return Finding(f"port {chosen}", "ok", "free")


def shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding("/dev/shm", "warn", "missing", "mount a tmpfs there: NCCL and data loaders use it")
    small = size < SHARED_MEMORY
    fix = "raise it: docker run --shm-size=8g (or --ipc=host); NCCL and data loaders use it"
    return Finding("/dev/shm", "warn" if small else "ok", f"{size / GIB:,.2f} GiB", fix if small else "")


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < OPEN_FILES
    fix = f"ulimit -n {hard if 0 <= hard < 65536 else 65536}: sharded weights and many ranks need files and sockets"
    return Finding("open files", "warn" if few else "ok", f"at most {soft if soft >= 0 else 'any'}", fix if few else "")
