"""The lifeline's server accepts only ranks that send its token, and nothing but lines of JSON."""

from __future__ import annotations

import json
import pickle
import socket
from typing import Any

import pytest

from alignx_ds.runtime.lifeline.client import Client
from alignx_ds.runtime.lifeline.connection import MAX_LINE
from alignx_ds.runtime.lifeline.server import Server


@pytest.fixture
def server() -> Server:
    return Server(2, ["127.0.0.1"])


def send(server: Server, *lines: bytes) -> bytes:
    """What the server answers before it closes the connection, or before this end does."""
    port = json.loads(server.advertisement)["port"]
    with socket.create_connection(("127.0.0.1", port), timeout=20.0) as sock:
        try:
            sock.sendall(b"".join(lines))
            return sock.recv(100)
        except (ConnectionResetError, BrokenPipeError):
            return b""


def greeting(server: Server, **changes: Any) -> bytes:
    token = json.loads(server.advertisement)["token"]
    return json.dumps({"token": token, "rank": 1, "host": "h"} | changes).encode() + b"\n"


def test_the_connections_of_strangers_are_closed(server: Server) -> None:
    wrong = [
        greeting(server, token="0" * 32),
        greeting(server, token="\ud800"),
        greeting(server, token=None),
        greeting(server, rank=2),
        greeting(server, rank="1"),
        greeting(server, rank=[]),
        b'{"kind": "failed", "message": "", "code": 1}\n',
        b"[]\n",
        b"[" * (MAX_LINE - 2) + b"\n",
        b"x" * 2 * MAX_LINE,
        pickle.dumps({"token": 1}) + b"\n",
    ]
    for line in wrong:
        assert send(server, line) == b"", line[:80]
    assert server.missing() == [0, 1]


def test_the_server_ends_when_all_ranks_have_finished(server: Server) -> None:
    client = Client(0, server.advertisement)
    answer = send(server, greeting(server) + b'{"kind": "finished"}\n')  # unfinished, its end would end this process
    assert json.loads(answer.splitlines()[0]) == {"kind": "accepted"}
    assert client.all_connected.wait(20.0)
    client.finish()
    server.join(20.0)
    assert not server.is_alive()
