"""`alignx-ds doctor` on this machine as it is, and with faults that are made for real: each is found, with its fix."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignx_ds import cli
from alignx_ds.doctor import examine, hardware, report, software
from alignx_ds.doctor import ranks as doctor_ranks
from alignx_ds.doctor.findings import Finding
from alignx_ds.runtime.interfaces import interface_towards

Snapshot = Callable[[Path], dict[str, bytes | None]]
pytestmark = [pytest.mark.usefixtures("no_launcher"), pytest.mark.timeout(200)]


def the(findings: Iterator[Finding], what: str) -> Finding:
    (found,) = [row for row in findings if row.what == what]
    return found


def diagnosis(directory: Path, *before: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    line = [*before, sys.executable, "-m", "alignx_ds", "doctor", str(directory)]
    repo = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(repo), **more}
    return subprocess.run(line, cwd=repo, env=environment, capture_output=True, text=True, timeout=180, check=False)


def test_a_healthy_machine_passes_and_nothing_is_left_behind(tmp_path: Path, snapshot: Snapshot) -> None:
    (tmp_path / "scratch").mkdir()
    more = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "none"), "TMPDIR": str(tmp_path / "scratch")}
    before = snapshot(tmp_path)
    done = diagnosis(tmp_path / "runs" / "not-yet", **more)
    assert done.returncode == 0, done.stdout
    assert "\nfail " not in done.stdout and "no failures" in done.stdout and "Traceback" not in done.stderr
    for what in (
        "Python",
        "dependencies",
        "MPI",
        "accelerator",
        "cores",
        "/dev/shm",
        "open files",
        "deepspeed",
        "srun",
    ):
        assert f" {what}: " in done.stdout
    for step in ("rendezvous", "all_reduce", "all_to_all", "MoE dispatch"):
        assert f"ok    2 ranks on gloo: {step}: " in done.stdout
    assert snapshot(tmp_path) == before


def test_a_dependency_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "safetensors-0.1.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.1\n")
    assert "safetensors" in the(software.versions(), "dependencies").seen
    monkeypatch.syspath_prepend(tmp_path)
    found = the(software.versions(), "safetensors")
    assert (found.grade, found.seen) == ("fail", "0.1 (>=0.5)")
    assert found.fix == "pip install 'safetensors>=0.5'"


def test_a_package_of_an_extra_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["no-such-package>=1", "no-such-extra>=2 ; extra == 'judge'", "no-such-tool ; extra == 'dev'"]
    monkeypatch.setattr(software.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(software, "_extras", lambda about: ["judge"])
    found = {row.what: row for row in software.versions()}
    assert found["no-such-package"] == Finding(
        "no-such-package", "fail", "not installed (>=1)", "pip install 'no-such-package>=1'"
    )
    assert (found["no-such-extra"].grade, found["no-such-extra"].fix) == ("–", "pip install 'alignx-ds[judge]'")
    assert "no-such-tool" not in found


def test_an_optional_launcher_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    srun, torchrun = (the(software.launchers(), name) for name in ("srun", "torchrun"))
    assert srun.line() == (
        "–     srun: not installed; only needed on a Slurm cluster (launch/slurm.sh) -> nothing to do without Slurm"
    )
    assert (torchrun.grade, torchrun.seen) == (
        "–",
        "installed, but not on PATH; only needed to start ranks with torchrun",
    )
    assert "activate the virtual environment" in torchrun.fix
    (tmp_path / "srun").touch(mode=0o755)
    assert the(software.launchers(), "srun") == Finding("srun", "ok", str(tmp_path / "srun"))


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[None]:
    directory.mkdir()
    tried = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "alignx", directory], capture_output=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"no mounts here: {tried.stderr!r}")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize(
    ("options", "seen", "fix"),
    [
        ("size=64k", "No space left on device", "free some space, or choose another directory"),
        ("size=64m", "GiB free", "free some space, or choose another directory"),
        ("ro", "Read-only file system", "make it writable, or choose another directory"),
    ],
)
def test_a_directory_that_is_full_small_or_read_only(tmp_path: Path, options: str, seen: str, fix: str) -> None:
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounts need root")
    with mounted(tmp_path / "disk", options):
        found = hardware.disk(tmp_path / "disk" / "runs")
        assert not list((tmp_path / "disk").iterdir())
    assert found.grade == "fail"
    assert seen in found.seen
    assert found.fix.startswith(fix) and "output=DIRECTORY" in found.fix


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    found = hardware.disk(tmp_path / "runs")
    assert (found.grade, found.seen) == ("fail", f"{tmp_path / 'runs'} is a file")
    assert "choose another directory" in found.fix


def test_a_busy_rendezvous_port() -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("", hardware.RENDEZVOUS_PORT))
        except OSError:
            pytest.skip("the port is busy already")
        holder.listen()
        found = hardware.port()
    assert (found.what, found.grade, found.seen) == ("port 29500", "warn", "Address already in use")
    assert "MASTER_PORT=" in found.fix
    assert hardware.port().grade == "ok"


@pytest.mark.parametrize("given", ["", "x", "0", "65536"])
def test_a_rendezvous_port_that_is_none(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("MASTER_PORT", given)
    found = hardware.port()
    assert (found.what, found.grade, found.seen) == ("MASTER_PORT", "fail", f"{given!r} is no port number")
    assert found.fix.startswith("unset it, or set MASTER_PORT=")


def test_variables_that_make_a_run_fail_or_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All at once, through the command; the checks that take seconds are left out."""
    lock = tmp_path / "extensions" / "py311" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    given = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "nowhere.invalid", "HF_HUB_OFFLINE": "1"}
    for name, value in {**given, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(report, "examine", lambda directory: software.environment())
    assert cli.main(["doctor"]) == 2
    shown = capsys.readouterr().out
    assert "fail  launcher's variables: RANK=1, WORLD_SIZE=4, outside a launcher -> unset RANK WORLD_SIZE" in shown
    assert "fail  MASTER_ADDR: nowhere.invalid: " in shown and "a name or an address of the first host" in shown
    assert "warn  HF_HUB_OFFLINE: 1 -> unset HF_HUB_OFFLINE" in shown
    assert "warn  torch extensions: a lock file, 120 minutes old" in shown and f"rm {lock}" in shown
    assert shown.endswith("2 failures, 2 warnings\n")


def test_ranks_of_a_launcher_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert "launcher's variables" not in [row.what for row in software.environment()]


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    found = hardware.cores()
    assert found.grade == "warn" and found.fix.startswith("set OMP_NUM_THREADS to cores / ranks")


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        found = hardware.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.grade, found.seen) == ("warn", "at most 256") and found.fix.startswith("ulimit -n ")


def test_ranks_that_are_given_a_wrong_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    (found,) = examine.ranks("gloo")
    assert (found.what, found.grade) == ("2 ranks on gloo: rendezvous", "fail")
    assert "nosuch0" in found.seen
    assert found.fix.startswith("unset GLOO_SOCKET_IFNAME, or name an interface of this machine: lo")


def test_ranks_that_can_not_meet_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rank is stopped as soon as it is there."""
    start = doctor_ranks._start

    def start_and_stop(backend: str, scratch: Path) -> list[doctor_ranks._Rank]:
        running = start(backend, scratch)
        running[1].process.send_signal(signal.SIGSTOP)
        started.extend(running)
        return running

    started: list[doctor_ranks._Rank] = []
    monkeypatch.setattr(doctor_ranks, "_start", start_and_stop)
    (found,) = examine.ranks("gloo", start_limit=2.0)
    assert (found.what, found.grade, found.seen) == ("2 ranks on gloo: rendezvous", "fail", "not finished within 2 s")
    assert "loopback up" in found.fix
    assert all(rank.process.poll() is not None for rank in started)


def test_a_machine_that_can_not_reach_itself(tmp_path: Path) -> None:
    """In a network namespace of its own the loopback is down."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces here")
    done = diagnosis(tmp_path, "unshare", "--net")
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("fail  ")]
    assert line.startswith("fail  2 ranks on gloo: rendezvous: ")
    assert "make this machine reachable from itself: loopback up" in line


def test_the_interface_that_leads_to_another_host() -> None:
    assert (
        interface_towards("127.0.0.1") == interface_towards("localhost") == interface_towards("nowhere.invalid") == ""
    )
