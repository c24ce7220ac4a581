"""Start ranks of a script, one by one or with DeepSpeed's launcher; an error shows what every rank wrote."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from processes import cpu_environment, deepspeed_command, kill_group, rank_variables


class RanksError(AssertionError):
    """A rank failed or hung; the message ends with what every rank wrote."""


def start(
    script: Path, ranks: int, *arguments: str, logs: Path, timeout: float = 240.0, launcher: bool = False
) -> None:
    """Returns when every rank has ended without an error; otherwise kills all of them and raises RanksError."""
    logs.mkdir(parents=True, exist_ok=True)
    environment = cpu_environment(PYTHONFAULTHANDLER="1")
    command = [str(script), *arguments]
    jobs = {"launcher": ([*deepspeed_command(ranks), *command], environment)}
    if not launcher:
        ours = [sys.executable, *command]
        jobs = {f"rank{v['RANK']}": (ours, environment | v) for v in rank_variables(ranks)}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, (line, variables) in jobs.items():
            with (logs / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    line, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
        problem = _wait(running, timeout)
    finally:
        for process in running.values():
            kill_group(process)
    if problem:
        written = "\n".join(f"--- {n}\n{(logs / f'{n}.log').read_text(errors='replace')}" for n in jobs)
        raise RanksError(f"{problem}\n{written}")


def _wait(running: dict[str, subprocess.Popen[bytes]], timeout: float) -> str:
    """What went wrong; empty if nothing did."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = {name: process.poll() for name, process in running.items()}
        if all(code == 0 for code in codes.values()):
            return ""
        failed = {name: code for name, code in codes.items() if code}
        if failed:
            time.sleep(1.0)  # for the error messages of the other ranks
            return f"exit codes {failed}"
        time.sleep(0.05)
    return f"still running after {timeout:g} s: {[n for n, p in running.items() if p.poll() is None]}"
