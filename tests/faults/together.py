"""Start plain processes as ranks, and leave them alone: unlike a launcher, nothing ends the others when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from alignx_ds.runtime.distributed import free_port

REPO = Path(__file__).resolve().parents[2]
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """How all of them ended; `codes` holds None for one that had to be killed at the deadline."""

    codes: list[int | None]
    console: str  # what all ranks wrote, into one terminal
    seconds: float  # from the first end, or the start, to the last


def environment(**more: str) -> dict[str, str]:
    shared = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return shared | {"PYTHONPATH": str(REPO)} | more


def start(
    arguments: list[str],
    ranks: int,
    console: Path,
    *,
    deadline: float = 60.0,
    of: int | None = None,
    meanwhile: Callable[[list[subprocess.Popen[bytes]]], None] | None = None,
    alone: dict[int, list[str]] | None = None,
    master: str = "127.0.0.1",
) -> Ended:
    """`python ARGUMENTS` on each of so many ranks `of` a world, a rank in `alone` with arguments of its own."""
    world = {"WORLD_SIZE": str(of or ranks), "MASTER_ADDR": master, "MASTER_PORT": str(free_port())}
    ready = tempfile.TemporaryDirectory()
    world |= {"READY_DIRECTORY": ready.name, "STARTED_RANKS": str(ranks)}
    commands = [[sys.executable, *(alone or {}).get(rank, arguments)] for rank in range(ranks)]
    with ready, console.open("wb") as stream:
        running = [
            subprocess.Popen(
                command,
                cwd=REPO,
                env=environment(**world, RANK=str(rank), LOCAL_RANK=str(rank)),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank, command in enumerate(commands)
        ]
        return _watch(running, console, deadline, meanwhile)


def launch(arguments: list[str], ranks: int, console: Path, *, deadline: float = 60.0) -> Ended:
    """The same under DeepSpeed's launcher; its code is the only one."""
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "-q", "--no_local_rank"]
    options = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    with console.open("wb") as stream:
        process = subprocess.Popen(
            [*launcher, *options, *arguments],
            cwd=REPO,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return _watch([process], console, deadline, None)


def _watch(
    running: list[subprocess.Popen[bytes]],
    console: Path,
    deadline: float,
    meanwhile: Callable[[list[subprocess.Popen[bytes]]], None] | None,
) -> Ended:
    first, last = 0.0, time.monotonic() + deadline
    try:
        if meanwhile:
            meanwhile(running)
        while (left := [p for p in running if p.poll() is None]) and time.monotonic() < last:
            first = first or (time.monotonic() if len(left) < len(running) else 0.0)
            time.sleep(0.02)
        codes = [process.poll() for process in running]
        seconds = time.monotonic() - first if first else 0.0
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(codes, console.read_text(errors="replace"), seconds)


def await_words(console: Path, words: list[str], patience: float = 40.0) -> None:
    until = time.monotonic() + patience
    while not all(word in console.read_text(errors="replace") for word in words):
        assert time.monotonic() < until, console.read_text(errors="replace")
        time.sleep(0.05)
