"""Rank 0's end of the lifeline: which ranks are connected, which have failed, and when all have to exit."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from math import inf
from typing import Any

from alignx_ds.runtime.exit import write_stderr
from alignx_ds.runtime.failures import CRASHED, Failure
from alignx_ds.runtime.lifeline.connection import Connection

FAILURE_WINDOW = 2.0  # seconds from the first failure in which the other ranks may report theirs
LATE_LIMIT = 15.0  # seconds that the server of a failed job stays up for ranks that have not connected yet
EXIT_LIMIT = 1.0  # seconds that rank 0 waits for the other ranks to exit


class Server(threading.Thread):
    """Listens as soon as it is made. `advertisement` (JSON) holds what the other ranks need in order to connect."""

    def __init__(self, world_size: int, addresses: list[str]) -> None:
        super().__init__(name="lifeline-server", daemon=True)
        self.world_size, self.late_limit = world_size, LATE_LIMIT
        self.connections: dict[int, Connection] = {}  # by rank, closed ones included
        self._finished: set[int] = set()
        self._disconnected: set[int] = set()
        self._failures: dict[int, Failure] = {}
        self._exit_message: dict[str, Any] | None = None
        self._deadline = inf
        self._token = secrets.token_hex(16)
        local = addresses == ["127.0.0.1"]
        self._listener = socket.create_server(("127.0.0.1" if local else "", 0), backlog=max(128, world_size))
        os.register_at_fork(after_in_child=self._listener.close)
        port = self._listener.getsockname()[1]
        self.advertisement = json.dumps({"addresses": addresses, "port": port, "token": self._token})
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.start()

    def run(self) -> None:
        while not self._is_over():
            left = self._deadline - time.monotonic()
            for key, _ in self._selector.select(None if left == inf else max(0.0, left)):
                if key.data is None:
                    self._accept()
                elif (messages := key.data.receive()) is None:
                    self._close_lost(key.data)
                else:
                    for message in messages:
                        self._handle(key.data, message)
            if self._failures and self._exit_message is None and time.monotonic() >= self._deadline:
                self._end_job()
        if self._exit_message:
            self.connections[0].send(**self._exit_message)  # ends this process

    def missing(self) -> list[int]:
        """The ranks that have never connected."""
        return [rank for rank in range(self.world_size) if rank not in self.connections]

    def _is_over(self) -> bool:
        if self._exit_message is None:
            return len(self._finished) == self.world_size
        return time.monotonic() >= self._deadline or len(self._disconnected | {0}) == self.world_size

    def _accept(self) -> None:
        with suppress(OSError):
            sock = self._listener.accept()[0]
            self._selector.register(sock, selectors.EVENT_READ, Connection(sock))

    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if connection.rank < 0:
            self._authenticate(connection, message)
        elif kind == "failed" and self._exit_message is None:
            self._failures[connection.rank] = Failure(str(message["message"]), int(message["code"]))
            all_failed = len(self._failures) == self.world_size
            self._deadline = 0.0 if all_failed else min(self._deadline, time.monotonic() + FAILURE_WINDOW)
        elif kind == "finished":
            self._finished.add(connection.rank)
            if connection.rank == 0:
                self._broadcast(kind="finished")

    def _authenticate(self, connection: Connection, message: dict[str, Any]) -> None:
        token, rank = str(message.get("token")), message.get("rank")
        known = hmac.compare_digest(token.encode(errors="replace"), self._token.encode())
        if not known or not isinstance(rank, int) or rank not in range(self.world_size) or rank in self.connections:
            self._close(connection)
            return
        connection.rank, connection.host = rank, str(message.get("host"))
        self.connections[rank] = connection
        connection.send(kind="accepted")
        if self._exit_message and rank:
            connection.send(**self._exit_message)
        if not self.missing():
            self._broadcast(kind="all connected")

    def _close_lost(self, connection: Connection) -> None:
        """A rank whose connection closes before it has finished, and without a report, was killed."""
        self._close(connection)
        rank = connection.rank
        if rank < 0:
            return
        self._disconnected.add(rank)
        if self._exit_message is None and rank not in self._finished | self._failures.keys():
            reason = f"ended without an error message on host {connection.host}: killed, or out of memory"
            self._failures = {rank: Failure(reason, CRASHED)}  # failures of the other ranks are its consequence
            self._deadline = 0.0

    def _close(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _end_job(self) -> None:
        rank, failure = next(iter(self._failures.items()))
        alike = self._failures.keys() >= self.connections.keys() and len(set(self._failures.values())) == 1
        write_stderr(failure.lines("" if alike else f"rank {rank}: "))
        self._exit_message = {"kind": "exit", "rank": rank, "code": failure.code}
        self._broadcast(others_only=True, **self._exit_message)
        self._deadline = time.monotonic() + (self.late_limit if self.missing() else EXIT_LIMIT)

    def _broadcast(self, *, others_only: bool = False, **message: Any) -> None:
        for rank, connection in self.connections.items():
            if rank not in self._disconnected and not (others_only and rank == 0):
                connection.send(**message)
