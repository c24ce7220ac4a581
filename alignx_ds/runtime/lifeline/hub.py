"""Rank 0's side: who has come, who has failed, and what everyone is told."""

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

from alignx_ds.runtime.lifeline.channel import Channel
from alignx_ds.runtime.lifeline.failure import KILLED, Failure, speak

LOCKSTEP = 2.0  # seconds that ranks are given to fail alike
LATE = 15.0  # seconds that a failed job waits for ranks that have not come yet, to tell them
PARTING = 1.0  # seconds that rank 0 waits for those that it has told


class Hub(threading.Thread):
    """A thread that listens from its making on; others find it by the `invitation`."""

    def __init__(self, world: int, addresses: list[str]) -> None:
        super().__init__(name="lifeline-hub", daemon=True)
        self.world, self.late = world, LATE
        self.peers: dict[int, Channel] = {}  # all that ever came, by rank
        self._done: set[int] = set()
        self._gone: set[int] = set()
        self._failures: dict[int, Failure] = {}
        self._verdict: dict[str, Any] | None = None
        self._deadline = inf
        self._token = secrets.token_hex(16)
        local = addresses == ["127.0.0.1"]
        self._server = socket.create_server(("127.0.0.1" if local else "", 0), backlog=max(128, world))
        os.register_at_fork(after_in_child=self._server.close)
        port = self._server.getsockname()[1]
        self.invitation = json.dumps({"addresses": addresses, "port": port, "token": self._token})
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self.start()

    def run(self) -> None:
        while not self._over():
            left = self._deadline - time.monotonic()
            for key, _ in self._selector.select(None if left == inf else max(0.0, left)):
                if key.data is None:
                    self._accept()
                elif (messages := key.data.receive()) is None:
                    self._lost(key.data)
                else:
                    for message in messages:
                        self._hear(key.data, message)
            if self._failures and self._verdict is None and time.monotonic() >= self._deadline:
                self._pronounce()
        if self._verdict:
            self.peers[0].send(**self._verdict)  # ends this process

    def missing(self) -> list[int]:
        return [rank for rank in range(self.world) if rank not in self.peers]

    def _over(self) -> bool:
        if self._verdict is None:
            return len(self._done) == self.world
        return time.monotonic() >= self._deadline or len(self._gone | {0}) == self.world

    def _accept(self) -> None:
        with suppress(OSError):
            self._selector.register(link := self._server.accept()[0], selectors.EVENT_READ, Channel(link))

    def _hear(self, peer: Channel, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if peer.rank < 0:
            self._welcome(peer, message)
        elif kind == "failed" and self._verdict is None:
            self._failures[peer.rank] = Failure(str(message["message"]), int(message["code"]))
            everyone = len(self._failures) == self.world
            self._deadline = 0.0 if everyone else min(self._deadline, time.monotonic() + LOCKSTEP)
        elif kind == "done":
            self._done.add(peer.rank)
            if peer.rank == 0:
                self._tell(kind="done")

    def _welcome(self, peer: Channel, message: dict[str, Any]) -> None:
        token, rank = str(message.get("token")), message.get("rank")
        known = hmac.compare_digest(token.encode(errors="replace"), self._token.encode())
        if not known or not isinstance(rank, int) or rank not in range(self.world) or rank in self.peers:
            self._drop(peer)
            return
        peer.rank, peer.host = rank, str(message.get("host"))
        self.peers[peer.rank] = peer
        peer.send(kind="welcome")
        if self._verdict and peer.rank:
            peer.send(**self._verdict)
        if not self.missing():
            self._tell(kind="complete")

    def _lost(self, peer: Channel) -> None:
        self._drop(peer)
        if peer.rank < 0:
            return
        self._gone.add(peer.rank)
        if self._verdict is None and peer.rank not in self._done | self._failures.keys():
            words = f"ended without a word on host {peer.host}: killed, or out of memory"
            self._failures = {peer.rank: Failure(words, KILLED)}  # errors of the others come of it
            self._deadline = 0.0

    def _drop(self, peer: Channel) -> None:
        self._selector.unregister(peer.link)
        peer.link.close()

    def _pronounce(self) -> None:
        rank, failure = next(iter(self._failures.items()))
        alike = self._failures.keys() >= self.peers.keys() and len(set(self._failures.values())) == 1
        speak(failure.lines("" if alike else f"rank {rank}: "))
        self._verdict = {"kind": "end", "rank": rank, "code": failure.code}
        self._tell(others_only=True, **self._verdict)
        self._deadline = time.monotonic() + (self.late if self.missing() else PARTING)

    def _tell(self, *, others_only: bool = False, **message: Any) -> None:
        for rank, peer in self.peers.items():
            if rank not in self._gone and not (others_only and rank == 0):
                peer.send(**message)
