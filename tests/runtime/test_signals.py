"""How a process reacts to SIGTERM, SIGUSR1 and SIGINT; each test starts one of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from alignx_ds.runtime import signals
from alignx_ds.errors import Stopped
try:
    with signals.graceful_stop():
        print("up", flush=True)
        end = time.monotonic() + 20
        while not signals.stop_requested() and time.monotonic() < end:
            time.sleep(0.01)
        print("asked", flush=True)
        if "stuck" in sys.argv:
            time.sleep(20)
        signals.stop_if_requested("here")
except Stopped as stopped:
    print("stopped", stopped, stopped.code, flush=True)
assert not signals.stop_requested(), "a later run in the same process starts anew"
with signals.immediate_stop("there"):
    try:
        print("again", flush=True)
        time.sleep(20)
    except Stopped as stopped:
        print("stopped", stopped, stopped.code, flush=True)
"""


def started(*arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    line = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_the_first_signal_requests_a_stop(number: signal.Signals, code: int) -> None:
    with started() as process:
        assert next_line(process) == "up"
        process.send_signal(number)
        if number != signal.SIGINT:
            process.send_signal(number)  # forwarded by a launcher as well: the same request
        lines = [next_line(process), next_line(process), next_line(process)]
        assert lines == ["asked", f"stopped here {code}", "again"]
        process.send_signal(number)
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, f"stopped there {code}\n")
    assert errors.count(number.name) == 1


@pytest.mark.parametrize(("number", "apart"), [(signal.SIGTERM, 2.2), (signal.SIGINT, 0.5)])
def test_a_second_one_ends_the_process_at_once(number: signal.Signals, apart: float) -> None:
    with started("stuck") as process:
        assert next_line(process) == "up"
        process.send_signal(number)
        assert next_line(process) == "asked"
        time.sleep(apart)
        before = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=10) == 128 + number
        assert time.monotonic() - before < 10, "not at the end of the 20 s"
