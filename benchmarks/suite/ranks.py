"""Benchmarks on several ranks: the script starts itself under DeepSpeed's launcher and reads rank 0's result.

A launch costs about 13 s, so one launch measures everything of its world size. Worlds that are compared with each other
run at once and take turns, so that a change of the machine's speed affects all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

THREADS = 1  # per rank on a CPU, so that more ranks use more cores
STALE = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
HUNG = 7200.0  # seconds until the worlds are killed


def add_options(parser: argparse.ArgumentParser, default: list[int]) -> None:
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=default, metavar="N", help="world sizes (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and configurations, for a first look")
    parser.add_argument(
        "--worker", type=Path, help=argparse.SUPPRESS
    )  # set for ranks: the directory that the worlds share


def hide_gpus() -> None:
    """On a CPU, call this before anything initializes CUDA: DeepSpeed's launcher exposes GPUs to the ranks."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def collect(worlds: list[int], device: str) -> list[Any]:
    """Start all worlds at once with this process's command line; returns what `work` measured on each rank 0."""
    from alignx_ds.runtime import distributed

    running: dict[int, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the ranks are killed, below
    with tempfile.TemporaryDirectory() as directory:
        try:
            for ranks in worlds:
                launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "-q", "--no_local_rank"]
                launcher += ["--num_accelerators", str(ranks), "--master_port", str(distributed.free_port())]
                command = [*launcher, *sys.argv, "--worker", directory]
                running[ranks] = subprocess.Popen(command, env=_environment(device), start_new_session=True)
            _wait(running)
        finally:
            for process in running.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # the leader of a process group with all its ranks
                    process.wait()
        return [json.loads(_found(Path(directory), ranks).read_text(encoding="utf-8")) for ranks in worlds]


def _wait(running: dict[int, subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + HUNG
    while any(process.poll() is None for process in running.values()):
        failed = {ranks: process.poll() for ranks, process in running.items() if process.poll()}
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for ranks, process in running.items():
        if process.poll():
            raise SystemExit(f"{ranks} ranks: exit code {process.poll()}; see above")
    if any(process.poll() is None for process in running.values()):
        raise SystemExit(f"ranks still running after {HUNG:g} s were ended")


def _environment(device: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in STALE}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(THREADS)}
    return environment


def _found(directory: Path, ranks: int) -> Path:
    return directory / f"found.{ranks}.json"


def work(directory: Path, measure: Callable[[], Any]) -> NoReturn:
    """The program of one rank; rank 0 writes what it has measured into the directory. Does not return."""
    from alignx_ds.config.schema import LaunchConfig
    from alignx_ds.runtime import distributed

    distributed.init_process_group(LaunchConfig.timeout)
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.device())
    found = measure()
    if distributed.is_main():
        _found(directory, distributed.world_size()).write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.shutdown()
    distributed.exit_rank(0)


class Turns:
    """Turns of worlds that run at once: turn t belongs to world t modulo their number; the other worlds wait."""

    def __init__(self, directory: Path, worlds: list[int], own: int) -> None:
        self.directory, self.worlds, self.own = directory, worlds, own
        self.number = worlds.index(own)

    def ready(self) -> None:
        """Wait for all worlds. Collective."""
        from alignx_ds.runtime import distributed

        distributed.barrier()
        if distributed.is_main():
            (self.directory / f"ready.{self.own}").touch()
        for world in self.worlds:
            _wait_for(self.directory / f"ready.{world}")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """This world's next turn. Collective; every world must take equally many."""
        from alignx_ds.runtime import distributed

        if self.number:
            _wait_for(self.directory / f"turn.{self.number - 1}")
        distributed.barrier()
        yield
        distributed.barrier()
        if distributed.is_main():
            (self.directory / f"turn.{self.number}").touch()
        self.number += len(self.worlds)


def _wait_for(path: Path) -> None:
    """Polls a file: waiting in a collective would keep the GPU busy that another world is using."""
    while not path.exists():
        time.sleep(0.005)


def threads(device: str) -> int | None:
    """CPU threads of each rank; None on a GPU machine, where the environment decides."""
    return THREADS if device == "cpu" else None


def check(worlds: list[int], device: str) -> list[str]:
    """Notes on worlds with more ranks than cores and on a busy machine. Exits if there are too few GPUs."""
    import torch

    room = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    over = [n for n in worlds if n > room]
    if over and device == "cuda":
        raise SystemExit(f"--ranks {' '.join(map(str, over))}: this machine has {room} GPUs")
    notes = [f"{n} ranks on {room} cores: oversubscribed, so no faster than {room} ranks can be" for n in over]
    load = os.getloadavg()[0]
    if device == "cpu" and load > 0.5 * room:
        busy = f"other processes kept the machine busy (load {load:.1f} on {room} cores when this began)"
        notes.append(f"{busy}: worst for several ranks, which wait for the slowest of them")
    return notes
