"""Lines of JSON between a rank and the hub: nothing that comes over the network is ever unpickled."""

from __future__ import annotations

import json
import os
import socket
import struct
from contextlib import suppress
from typing import Any

LINE = 1 << 16  # bytes; who sends a longer line is none of ours
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a host that is gone is noticed in 30 s


class Channel:
    """Lines of JSON over a connection. Sending gives up after some seconds, so that nobody can block the hub."""

    def __init__(self, link: socket.socket) -> None:
        self.link, self.rank, self.host = link, -1, ""
        self._unread = b""
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 5, 0))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        os.register_at_fork(after_in_child=link.close)  # or the connection would outlive its rank in a child

    def send(self, **message: Any) -> None:
        with suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The lines that have come; None at the end, or after anything that no rank would send."""
        try:
            data = self.link.recv(LINE)
            *lines, self._unread = (self._unread + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return None
        sound = data and len(self._unread) < LINE and all(isinstance(m, dict) for m in messages)
        return messages if sound else None
