"""Start real ranks of a script, by hand or with DeepSpeed's launcher; a hang or a failure shows every rank's output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from alignx_ds.runtime.distributed import free_port


class RanksError(AssertionError):
    """A rank failed or hung; the message ends with what every rank wrote."""


def start(
    script: Path, ranks: int, *arguments: str, logs: Path, timeout: float = 240.0, launcher: bool = False
) -> None:
    """Returns when every rank has ended well; otherwise kills all of them and raises RanksError."""
    logs.mkdir(parents=True, exist_ok=True)
    shared = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        shared.pop(name, None)
    port = str(free_port())
    command = [sys.executable, str(script), *arguments]
    if launcher:
        program = [sys.executable, str(Path(sys.executable).parent / "deepspeed")]
        options = ["-q", "--no_local_rank", "--num_accelerators", str(ranks), "--master_port", port]
        jobs = {"launcher": ([*program, *options, *command[1:]], shared)}
    else:
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        jobs = {f"rank{r}": (command, {**shared, **world, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, (line, environment) in jobs.items():
            with (logs / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    line, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
        problem = _wait(running, timeout)
    finally:
        for process in running.values():
            _kill(process)
    if problem:
        written = "\n".join(f"--- {n}\n{(logs / f'{n}.log').read_text(errors='replace')}" for n in jobs)
        raise RanksError(f"{problem}\n{written}")


def _wait(running: dict[str, subprocess.Popen[bytes]], timeout: float) -> str:
    """What went wrong, or nothing."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = {name: process.poll() for name, process in running.items()}
        if all(code == 0 for code in codes.values()):
            return ""
        failed = {name: code for name, code in codes.items() if code}
        if failed:
            time.sleep(1.0)  # the others get a moment to write down what they think of it
            return f"exit codes {failed}"
        time.sleep(0.05)
    return f"still running after {timeout:g} s: {[n for n, p in running.items() if p.poll() is None]}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it has started: it leads a process group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
