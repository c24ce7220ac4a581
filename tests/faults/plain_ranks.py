"""Start ranks as plain processes. Unlike under a launcher, nothing ends the other ranks when one fails."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from processes import REPO, cpu_environment, deepspeed_command, kill_group, rank_variables

Running = list[subprocess.Popen[bytes]]


@dataclass(frozen=True)
class RanksResult:
    """How all of them ended; `codes` holds None for a process that had to be killed at the deadline."""

    codes: list[int | None]
    console: str  # what all ranks wrote, into one file
    seconds: float  # from the first end to the last


def start(
    arguments: list[str],
    ranks: int,
    console: Path,
    *,
    deadline: float = 120.0,
    world_size: int = 0,
    meanwhile: Callable[[Running], None] | None = None,
    alone: dict[int, list[str]] | None = None,
    master: str = "127.0.0.1",
) -> RanksResult:
    """`python ARGUMENTS` on the first ranks of a job of `world_size` (0: all); `alone`: a rank's own arguments."""
    variables = rank_variables(world_size or ranks, master)[:ranks]
    with tempfile.TemporaryDirectory() as ready, console.open("wb") as stream:
        shared = cpu_environment(READY_DIRECTORY=ready, STARTED_RANKS=str(ranks))
        running = [
            subprocess.Popen(
                [sys.executable, *(alone or {}).get(rank, arguments)],
                cwd=REPO,
                env=shared | own,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank, own in enumerate(variables)
        ]
        return _watch(running, console, deadline, meanwhile)


def launch(arguments: list[str], ranks: int, console: Path, *, deadline: float = 120.0) -> RanksResult:
    """The same under DeepSpeed's launcher; its exit code is the only one."""
    with console.open("wb") as stream:
        process = subprocess.Popen(
            [*deepspeed_command(ranks), *arguments],
            cwd=REPO,
            env=cpu_environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return _watch([process], console, deadline, None)


def _watch(running: Running, console: Path, limit: float, meanwhile: Callable[[Running], None] | None) -> RanksResult:
    first, deadline = 0.0, time.monotonic() + limit
    try:
        if meanwhile:
            meanwhile(running)
        while (left := [p for p in running if p.poll() is None]) and time.monotonic() < deadline:
            first = first or (time.monotonic() if len(left) < len(running) else 0.0)
            time.sleep(0.02)
        codes = [process.poll() for process in running]
        seconds = time.monotonic() - first if first else 0.0
    finally:
        for process in running:
            kill_group(process)
    return RanksResult(codes, console.read_text(errors="replace"), seconds)


def wait_for_text(console: Path, texts: list[str], limit: float = 60.0) -> None:
    """Until the ranks have written all of them."""
    deadline = time.monotonic() + limit
    while not all(text in console.read_text(errors="replace") for text in texts):
        assert time.monotonic() < deadline, console.read_text(errors="replace")
        time.sleep(0.05)
