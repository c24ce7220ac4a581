"""The `deepspeed` launcher, with ranks that get our signals: by itself it dies of them and leaves its ranks alone."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

import psutil

from alignx_ds.runtime import signals


def start(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """The exit code of the ranks, when all of them have ended."""
    launcher = subprocess.Popen(command, env=environment)

    def hand_on(signum: int, frame: FrameType | None) -> None:
        for process in _ranks(launcher.pid) or [psutil.Process(launcher.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    with signals.handled(hand_on):
        try:
            return launcher.wait()
        except BaseException:
            launcher.terminate()
            raise


def _ranks(launcher: int) -> list[psutil.Process]:
    """`deepspeed` starts one process for each node, and that one the node's ranks."""
    with suppress(psutil.NoSuchProcess):
        return [rank for node in psutil.Process(launcher).children() for rank in node.children()]
    return []
