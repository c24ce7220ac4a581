"""How a process reacts to SIGTERM and SIGUSR1; each test starts one of its own."""

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
with signals.graceful_stop():
    print("up", flush=True)
    end = time.monotonic() + 20
    while not signals.stop_requested() and time.monotonic() < end:
        time.sleep(0.01)
    print("asked", flush=True)
    if "stuck" in sys.argv:
        time.sleep(20)
    try:
        signals.stop_if_requested("here")
    except Stopped as stopped:
        print("stopped", stopped, flush=True)
assert not signals.stop_requested(), "a later run in the same process starts anew"
with signals.immediate_stop("there"):
    try:
        print("again", flush=True)
        time.sleep(20)
    except Stopped as stopped:
        print("stopped", stopped, flush=True)
"""


def started(*arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    line = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_requests_a_stop(number: signal.Signals) -> None:
    with started() as process:
        assert next_line(process) == "up"
        process.send_signal(number)
        process.send_signal(number)  # forwarded by a launcher as well: the same request
        assert [next_line(process), next_line(process), next_line(process)] == ["asked", "stopped here", "again"]
        process.send_signal(number)
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "stopped there\n")
    assert errors.count(number.name) == 1


def test_a_second_one_ends_the_process_at_once() -> None:
    with started("stuck") as process:
        assert next_line(process) == "up"
        process.send_signal(signal.SIGTERM)
        assert next_line(process) == "asked"
        time.sleep(2.2)
        before = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
        assert time.monotonic() - before < 10, "not at the end of the 20 s"
