"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to save its state and stop; a second one ends it at once."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from alignx_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, Stopped
from alignx_ds.runtime import distributed
from alignx_ds.runtime.exit import exit_now

# Slurm sends SIGUSR1 as a warning before the time limit; SIGINT is Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Signals within so many seconds are one request: a launcher forwards what the scheduler has sent to all processes.
SAME_REQUEST = 2.0
SAME_KEY = 0.25  # of two SIGINT: nobody presses Ctrl-C twice within it, but timeout(1) sends the signal twice


class Requests:
    """The signals that one process has received."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._first = 0.0  # its time

    def is_another(self, number: int) -> bool:
        """Record a signal; whether it is a request of its own after an earlier one."""
        now, self.numbers = time.monotonic(), [*self.numbers, number]
        if len(self.numbers) == 1:
            self._first = now
        pressed = self.numbers.count(signal.SIGINT) > 1 and number == signal.SIGINT
        return now - self._first > (SAME_KEY if pressed else SAME_REQUEST)

    @property
    def interrupted(self) -> bool:
        return signal.SIGINT in self.numbers


_requests = Requests()


def exit_code(*, interrupted: bool) -> int:
    """Of a run that has stopped with everything saved."""
    return EXIT_INTERRUPTED if interrupted else EXIT_STOPPED


@contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block the signals call this handler. For the main thread only."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def graceful_stop() -> Iterator[None]:
    """Within the block a signal requests a stop, which the run makes at its next `stop_if_requested`.

    A thread reads the signals from a socket, because Python runs signal handlers in the main thread only, which may be
    blocked in a collective when the second signal arrives.
    """
    global _requests
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    wakeup_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_read_signals, args=(receiver,), daemon=True).start()
    try:
        with signal_handler(_ignore):
            yield
    except Stopped as stopped:  # on all ranks, so that all have the code of the rank that received the signal
        stopped.code = exit_code(interrupted=any(distributed.gather(_requests.interrupted)))
        raise
    finally:
        signal.set_wakeup_fd(wakeup_before)
        sender.close()
        _requests = Requests()


@contextmanager
def immediate_stop(where: str) -> Iterator[None]:
    """Within the block the first signal raises Stopped at once: for work on one rank that saves every result."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(where, exit_code(interrupted=number == signal.SIGINT))

    with signal_handler(stop):
        yield


def stop_requested() -> bool:
    """Whether this rank has received one of the signals."""
    return bool(_requests.numbers)


def stop_if_requested(where: str) -> None:
    """Raises Stopped on all ranks when any rank has received a signal. Collective; called between two steps."""
    if any(distributed.gather(stop_requested())):
        raise Stopped(where)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Without a Python handler nothing would be written to the wake-up socket."""


def _read_signals(receiver: socket.socket) -> None:
    with receiver:
        while numbers := receiver.recv(16):
            for number in numbers:
                if number in STOP_SIGNALS:
                    _request_stop(number)


def _request_stop(number: int) -> None:
    first = not stop_requested()
    if _requests.is_another(number):
        exit_now(128 + number)
    if first and distributed.is_main():
        consequence = "stopping after the current step, with everything saved; a second signal ends the run at once"
        print(f"alignx-ds: {signal.Signals(number).name}: {consequence}", file=sys.stderr, flush=True)
