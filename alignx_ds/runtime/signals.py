"""SIGTERM and SIGUSR1 ask a run to save what is under way and end; a second one ends it at once.

The wish is heard by a thread of its own, so that the second signal works while a collective blocks the main thread.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from alignx_ds.errors import Stopped
from alignx_ds.runtime import distributed

ASKING = (signal.SIGTERM, signal.SIGUSR1)  # Slurm sends the second as a warning before the time limit
ONE_WISH = 2.0  # seconds: a launcher passes on what the scheduler has sent to all processes already

_asked: list[tuple[int, float]] = []  # (signal, when) of the first one


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within it this is what the two signals do. In the main thread of a process."""
    before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def heard() -> Iterator[None]:
    """Within it the two signals are wishes."""
    heard_by, told = socket.socketpair()
    told.setblocking(False)
    wake_before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard_by,), daemon=True).start()
    try:
        with handled(_pass):
            yield
    finally:
        signal.set_wakeup_fd(wake_before)
        told.close()
        _asked.clear()


@contextmanager
def obeyed(where: str) -> Iterator[None]:
    """Within it the first signal raises Stopped at once: for work that is kept as it is made, on one rank alone."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(where)

    with handled(stop):
        yield


def asked() -> bool:
    """Whether this rank has been asked to end."""
    return bool(_asked)


def stop_if_asked(where: str) -> None:
    """Between two steps of a run. Raises Stopped on all ranks when any has been asked. Collective."""
    if any(distributed.gather(asked())):
        raise Stopped(where)


def _pass(number: int, frame: Any) -> None:
    """Python wants a handler, or it would not write to the wake-up socket."""


def _listen(heard_by: socket.socket) -> None:
    with heard_by:
        while numbers := heard_by.recv(16):
            for number in numbers:
                if number in ASKING:
                    _hear(number)


def _hear(number: int) -> None:
    now = time.monotonic()
    if not _asked:
        _asked.append((number, now))
        if distributed.is_main():
            what = "what is under way is saved at the end of its step; a second signal ends the run at once"
            print(f"alignx-ds: {signal.Signals(number).name}: {what}", file=sys.stderr, flush=True)
    elif now - _asked[0][1] > ONE_WISH:
        os._exit(128 + number)
