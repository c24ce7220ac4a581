"""A rank's side: it says how the rank fares, and ends the process when the job ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

from alignx_ds.runtime.lifeline.channel import Channel
from alignx_ds.runtime.lifeline.failure import KILLED, Failure, end
from alignx_ds.runtime.lifeline.hub import LATE, LOCKSTEP

CONNECTED = 10.0  # seconds that a connection to the hub may take
ANSWER = LOCKSTEP + LATE + 3.0  # seconds after which a failing rank has no word from the hub to wait for
KEPT = 4000  # characters of a message


class Lifeline(threading.Thread):
    """Raises OSError when the hub that sent the invitation does not answer."""

    def __init__(self, rank: int, invitation: str) -> None:
        super().__init__(name="lifeline", daemon=True)
        self.rank = rank
        self.complete = threading.Event()  # every rank has come
        self._failure: Failure | None = None
        self._parted = False
        self._ending = threading.Lock()
        self._channel = self._connect(json.loads(invitation))
        self.start()

    def run(self) -> None:
        messages: list[dict[str, Any]] | None = self._first
        while messages is not None:
            for message in messages:
                self._hear(message)
            messages = self._channel.receive()
        if not self._parted:
            words = Failure("rank 0: ended without a word: killed, or out of memory", KILLED)
            self._end(words.lines() if self.rank == 1 else "", KILLED)

    def fail(self, failure: Failure) -> NoReturn:
        """Ends this process, and all others. Where the hub has no answer, this rank speaks for itself."""
        self._failure = failure
        self._channel.send(kind="failed", message=failure.message[:KEPT], code=failure.code)
        time.sleep(ANSWER)  # the thread ends the process in the meantime
        self._end(failure.traceback + failure.lines(f"rank {self.rank}: "), failure.code)

    def part(self) -> None:
        """This rank is done: its end is no failure."""
        self._parted = True
        self._channel.send(kind="done")

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "complete":
            self.complete.set()
        elif kind == "done":
            self._parted = True  # rank 0's end is no failure any more
        elif kind == "end":
            mine = self._failure if message["rank"] == self.rank else None
            self._end(mine.traceback if mine else "", int(message["code"]))

    def _end(self, words: str, code: int) -> NoReturn:
        self._ending.acquire()  # never given back: one thread ends the process
        end(words, code)

    def _connect(self, invitation: dict[str, Any]) -> Channel:
        port, addresses = invitation["port"], invitation["addresses"] if self.rank else ["127.0.0.1"]
        for address in addresses:
            with suppress(OSError):
                channel = Channel(socket.create_connection((address, port), timeout=CONNECTED))
                channel.link.settimeout(CONNECTED)
                channel.send(token=invitation["token"], rank=self.rank, host=socket.gethostname())
                answer = channel.receive()
                if answer and answer[0].get("kind") == "welcome":
                    channel.link.settimeout(None)
                    self._first = answer[1:]
                    return channel
        raise ConnectionError(f"no answer on port {port} of {', '.join(addresses)}")
