"""A rank's end of the lifeline: reports this rank's failure or end, and exits when the server ends the job."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

from alignx_ds.runtime.exit import exit_now
from alignx_ds.runtime.failures import CRASHED, Failure
from alignx_ds.runtime.lifeline.connection import Connection
from alignx_ds.runtime.lifeline.server import FAILURE_WINDOW, LATE_LIMIT

CONNECT_LIMIT = 10.0  # seconds
ANSWER_LIMIT = FAILURE_WINDOW + LATE_LIMIT + 3.0  # seconds after which no answer to a reported failure will come
MAX_MESSAGE = 4000  # characters


class Client(threading.Thread):
    """Connects as soon as it is made. Raises OSError when the advertised server does not answer."""

    def __init__(self, rank: int, advertisement: str) -> None:
        super().__init__(name="lifeline-client", daemon=True)
        self.rank = rank
        self.all_connected = threading.Event()
        self._failure: Failure | None = None
        self._finished = False  # this rank, or rank 0: after that a closed connection is no failure
        self._exiting = threading.Lock()
        self._connection = self._connect(json.loads(advertisement))
        self.start()

    def run(self) -> None:
        messages: list[dict[str, Any]] | None = self._early_messages
        while messages is not None:
            for message in messages:
                self._handle(message)
            messages = self._connection.receive()
        if not self._finished:
            failure = Failure("rank 0: ended without an error message: killed, or out of memory", CRASHED)
            self._exit(CRASHED, failure.lines() if self.rank == 1 else "")

    def report_failure(self, failure: Failure) -> NoReturn:
        """End this process and all other ranks. If the server does not answer, this rank prints its own failure."""
        self._failure = failure
        self._connection.send(kind="failed", message=failure.message[:MAX_MESSAGE], code=failure.code)
        time.sleep(ANSWER_LIMIT)  # the answer ends the process in this thread
        self._exit(failure.code, failure.traceback + failure.lines(f"rank {self.rank}: "))

    def finish(self) -> None:
        """From now on the end of this process is no failure."""
        self._finished = True
        self._connection.send(kind="finished")

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "all connected":
            self.all_connected.set()
        elif kind == "finished":
            self._finished = True
        elif kind == "exit":
            own = self._failure if message["rank"] == self.rank else None
            self._exit(int(message["code"]), own.traceback if own else "")

    def _exit(self, code: int, text: str) -> NoReturn:
        self._exiting.acquire()  # never released, so that only one thread writes and exits
        exit_now(code, text)

    def _connect(self, server: dict[str, Any]) -> Connection:
        port, addresses = server["port"], server["addresses"] if self.rank else ["127.0.0.1"]
        for address in addresses:
            with suppress(OSError):
                connection = Connection(socket.create_connection((address, port), timeout=CONNECT_LIMIT))
                connection.socket.settimeout(CONNECT_LIMIT)
                connection.send(token=server["token"], rank=self.rank, host=socket.gethostname())
                answer = connection.receive()
                if answer and answer[0].get("kind") == "accepted":
                    connection.socket.settimeout(None)
                    self._early_messages = answer[1:]
                    return connection
        raise ConnectionError(f"no answer on port {port} of {', '.join(addresses)}")
