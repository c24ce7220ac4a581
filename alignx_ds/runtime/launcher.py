"""Runs the `deepspeed` launcher and forwards signals to its ranks: by itself it exits and leaves them running."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

import psutil
import torch

from alignx_ds.runtime import distributed, signals


def start_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Run `alignx-ds` with these arguments on this machine, on that many ranks; returns their exit code."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # As a module: the program is not beside this Python when packages are installed elsewhere (--target, --user).
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"]
    command += ["--num_accelerators", str(ranks)]
    command += ["--master_port", str(distributed.free_port()), "--module", "alignx_ds"]  # two runs may share a machine
    return run_launcher([*command, *arguments], environment)


def run_launcher(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the launcher's command until all ranks have ended; returns their exit code."""
    launcher = subprocess.Popen(command, env=environment)

    def forward(number: int, frame: FrameType | None) -> None:
        for process in _ranks(launcher.pid) or [psutil.Process(launcher.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    with signals.signal_handler(forward):
        try:
            return launcher.wait()
        except BaseException:
            launcher.terminate()
            raise


def _ranks(launcher: int) -> list[psutil.Process]:
    """`deepspeed` starts one process for each node, and that process starts the node's ranks."""
    with suppress(psutil.NoSuchProcess):
        return [rank for node in psutil.Process(launcher).children() for rank in node.children()]
    return []
