"""Signals on their way from the command through the launcher to the ranks, on stand-ins that start at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from alignx_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, Stopped
from alignx_ds.runtime.launcher import run_launcher

# The launcher starts a process for the node, and that one the rank, which gets this file's signals.
STARTS = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
RANK = """
import pathlib, signal, sys, time
def received(number, frame):
    with open(sys.argv[1], "a") as file:
        file.write(f"{number} ")
    if sys.argv[2] != "stuck":
        sys.exit(int(sys.argv[2]))
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, received)
pathlib.Path(sys.argv[1]).touch()
time.sleep(30)
"""


def once(condition: Callable[[], bool], numbers: list[signal.Signals], group: bool = False) -> None:
    """Send these signals to this process once the condition holds, half a second apart."""

    def send() -> None:
        end = time.monotonic() + 20
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        for number in numbers:
            for process in psutil.Process().children(recursive=True) if group else []:
                process.send_signal(number)  # as a terminal does
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=send, daemon=True).start()


def start(seen: Path, ending: str) -> int:
    python = [sys.executable, "-c"]
    return run_launcher([*python, STARTS, *python, STARTS, *python, RANK, str(seen), ending], os.environ)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, EXIT_STOPPED), (signal.SIGUSR1, EXIT_STOPPED), (signal.SIGINT, EXIT_INTERRUPTED)],
)
def test_a_request_reaches_the_ranks_once(tmp_path: Path, number: signal.Signals, code: int) -> None:
    seen = tmp_path / "seen"
    once(seen.exists, [number], group=number == signal.SIGINT)
    assert start(seen, str(EXIT_STOPPED)) == code
    asked = signal.SIGTERM if number == signal.SIGINT else number
    assert seen.read_text() == f"{int(asked)} "


def test_a_second_ctrl_c_kills_them(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    once(seen.exists, [signal.SIGINT, signal.SIGINT])
    before = time.monotonic()
    assert start(seen, "stuck") == EXIT_INTERRUPTED
    assert time.monotonic() - before < 20, "not at the end of the 30 s"
    assert not psutil.Process().children(recursive=True)


def test_a_failure_after_the_request_is_a_failure(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    once(seen.exists, [signal.SIGINT])
    assert start(seen, "1") == 1


def test_ranks_that_have_not_begun_are_ended(tmp_path: Path) -> None:
    up = tmp_path / "up"
    once(up.exists, [signal.SIGINT])
    begin = f"import pathlib, time; pathlib.Path({str(up)!r}).touch(); time.sleep(30)"
    with pytest.raises(Stopped) as stopped:
        run_launcher([sys.executable, "-c", begin], os.environ)
    assert stopped.value.code == EXIT_INTERRUPTED
