"""A TCP connection that carries lines of JSON. Nothing that comes over the network is ever unpickled."""

from __future__ import annotations

import json
import os
import socket
import struct
from contextlib import suppress
from typing import Any

MAX_LINE = 1 << 16  # bytes; a rank sends no longer line, so the connection of whoever does is closed
SEND_LIMIT = 5  # seconds; a peer that reads nothing must not block the server
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a lost host is detected within 30 s


class Connection:
    """One end of a connection. The server sets `rank` and `host` once the other end has sent a valid token."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket, self.rank, self.host = sock, -1, ""
        self._unread = b""
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_LIMIT, 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        os.register_at_fork(after_in_child=sock.close)  # a child's copy would keep it open after the rank has died

    def send(self, **message: Any) -> None:
        """A failure to send is ignored: the other end is gone, which `receive` reports."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None when the connection was closed or carried anything invalid."""
        try:
            data = self.socket.recv(MAX_LINE)
            *lines, self._unread = (self._unread + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        valid = data and len(self._unread) < MAX_LINE and all(isinstance(m, dict) for m in messages)
        return messages if valid else None
