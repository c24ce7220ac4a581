"""Runs the `deepspeed` launcher and forwards signals to its ranks: by itself it exits and leaves them running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

import psutil
import torch

from alignx_ds.errors import EXIT_STOPPED, Stopped
from alignx_ds.runtime import distributed, signals

KILLED = {code for number in signals.STOP_SIGNALS for code in (-number, 256 - number)}  # DeepSpeed's exit(-15) is 241


def start_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Run `alignx-ds` with these arguments on this machine, on that many ranks; returns their exit code."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # As a module: the program is not beside this Python when packages are installed elsewhere (--target, --user).
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    command += ["--no_local_rank", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(distributed.free_port()), "--module", "alignx_ds"]  # two runs may share a machine
    return run_launcher([*command, *arguments], environment)


def run_launcher(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the launcher's command until all ranks have ended; returns their exit code.

    The ranks see no Ctrl-C, which the terminal sends to all processes: this one asks them to stop, with SIGTERM. At a
    second request all of them are killed. Raises Stopped when a signal comes before they could have begun.
    """
    received = signals.Requests()
    killed = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal killed
        if received.is_another(number):
            killed = number
            _send(signal.SIGKILL, _started(launcher.pid))
        else:
            asking = signal.SIGTERM if number == signal.SIGINT else number
            _send(asking, _ranks(launcher.pid) or _started(launcher.pid))

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which the started processes inherit
    try:
        launcher = subprocess.Popen(command, env=environment)
        with signals.signal_handler(forward):
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            try:
                code = launcher.wait()
            except BaseException:
                launcher.terminate()
                raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if killed:
        return 128 + killed
    stopped = signals.exit_code(interrupted=received.interrupted)
    if received.numbers and code in KILLED:
        raise Stopped("the start of the ranks", stopped)
    return stopped if code == EXIT_STOPPED else code


def _send(number: int, processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _started(launcher: int) -> list[psutil.Process]:
    """The launcher and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        return [process, *process.children(recursive=True)]
    return []


def _ranks(launcher: int) -> list[psutil.Process]:
    """`deepspeed` starts one process for each node, and that process starts the node's ranks."""
    with suppress(psutil.NoSuchProcess):
        return [rank for node in psutil.Process(launcher).children() for rank in node.children()]
    return []
