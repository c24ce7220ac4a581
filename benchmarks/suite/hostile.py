"""Requests that a server has to refuse, and clients that are slow or leave. Each says which replies explain it."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

from suite.questions import CHAT, COMPLETIONS, PATIENCE, Question, Reply, read
from suite.served_models import NAME

BODY = {"model": NAME, "prompt": "how do i bake bread ?", "max_tokens": 8, "temperature": 0}
LEFT = Reply(0, "the client left")
MEGABYTE = b" " * 2**20
DRIPS, DRIP_SECONDS = 10, 0.2


@dataclass(frozen=True)
class Hostile:
    """A kind of request: what it does to the server at a port, and the statuses that it may be given."""

    name: str
    send: Callable[[int], Reply]
    statuses: tuple[int, ...]
    right: Reply | None = None  # where it is answered

    def explained(self, reply: Reply) -> bool:
        """A reply of one of its statuses, with a reason, or the right answer."""
        if reply.status not in self.statuses:
            return False
        return reply == self.right if reply.status == 200 and self.right else reply.status == 200 or bool(reply.said)


def head(length: int, path: str = COMPLETIONS, method: str = "POST", **headers: str) -> bytes:
    named = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(length)}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()


def _connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def _reply(connection: socket.socket) -> Reply:
    response = HTTPResponse(connection)
    try:
        response.begin()
        return read(response)
    except (OSError, HTTPException, ValueError, KeyError) as error:
        return Reply(0, f"{type(error).__name__}: {error}")


def _sent(port: int, *parts: bytes, pause: float = 0.0) -> Reply:
    """The reply to what is sent in parts. It may come before all of them could be sent."""
    with _connected(port) as connection:
        with suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        return _reply(connection)


def _refused(name: str, body: Any, status: int, **headers: str) -> Hostile:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Hostile(name, lambda port: _sent(port, head(len(text), **headers) + text), (status,))


def _leave(connection: socket.socket, *, reset: bool) -> Reply:
    """Close it; with `reset`, as the end of a process or a cut line would: without a word."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    return LEFT


def _cut(name: str, after: Callable[[bytes, bytes], bytes], *, reset: bool, wait: float = 0.0) -> Hostile:
    """The client sends this much of head and body, and leaves after so many seconds."""
    text = json.dumps(BODY | {"max_tokens": 100}).encode()

    def send(port: int) -> Reply:
        with _connected(port) as connection:
            connection.sendall(after(head(len(text)), text))
            time.sleep(wait)
            return _leave(connection, reset=reset)

    return Hostile(name, send, (LEFT.status,))


def _cut_stream(reset: bool) -> Hostile:
    text = json.dumps(BODY | {"max_tokens": 100, "stream": True}).encode()

    def send(port: int) -> Reply:
        with _connected(port) as connection:
            connection.sendall(head(len(text)) + text)
            seen = b""
            while b"data: " not in seen and (more := connection.recv(4096)):
                seen += more
            refused = b" 429 " in seen.partition(b"\r\n")[0]
            _leave(connection, reset=reset)
            if refused:
                return Reply(429, "the queue is full")
            return LEFT if b"data: " in seen else Reply(0, f"no stream: {seen!r}")

    return Hostile(f"left in the stream{', reset' if reset else ''}", send, (LEFT.status, 429))


def hostile(context: int, slots: int, queue: int, body: int) -> list[Hostile]:
    """Of a server with these limits. Each takes a moment; `lingering` has those that take longer."""
    long = {**BODY, "prompt": "bread " * (40 * context)}
    flood = {**BODY, "prompt": [[5, 6]] * queue, "max_tokens": 1}
    chunked = head(0, Transfer_Encoding="chunked", Content_Length="")
    pieces = [b"100000\r\n" + MEGABYTE + b"\r\n"] * (body // len(MEGABYTE) + 2)
    return [
        _refused("no JSON", b'{"model": ', 400),
        _refused("no UTF-8", b"\xff\xfe{}", 400),
        _refused("nested too deeply", b"[" * 100_000, 400),
        _refused("no object", [BODY], 400),
        _refused("no prompt", {"model": NAME}, 400),
        _refused("a prompt of a wrong type", {**BODY, "prompt": {"text": 1}}, 400),
        _refused("a temperature of a wrong type", {**BODY, "temperature": "hot"}, 400),
        _refused("a token that the model lacks", {**BODY, "prompt": [10**9]}, 400),
        _refused("an unknown parameter", {**BODY, "temprature": 0}, 400),
        _refused("an unsupported parameter", {**BODY, "logit_bias": {"5": 1}}, 400),
        _refused("an unknown axis", {**BODY, "axes": {"brave": 1}}, 400),
        _refused("an unknown model", {**BODY, "model": "m" * 2000}, 404),
        _refused("a dialogue without a question", {"model": NAME, "messages": [{"role": "system"}]}, 400, path=CHAT),
        _refused("a prompt over the context", long, 400),
        _refused("an answer over the context", {**BODY, "max_tokens": context}, 400),
        _refused("too many answers", {**BODY, "n": slots + 1}, 400),
        _refused("too many prompts", {**BODY, "prompt": [[5, 6]] * (queue + 1)}, 400),
        _refused("no JSON by its header", BODY, 415, Content_Type="text/plain"),
        _refused("another host", BODY, 403, Host="example.org"),
        _refused("an unknown path", BODY, 404, path="/v1/embeddings"),
        _refused("a wrong method", b"", 405, method="DELETE"),
        _refused("a negative length", b"", 400, Content_Length="-1"),
        Hostile("no HTTP", lambda port: _sent(port, b"\x16\x03\x01 what is this?\r\n\r\n"), (400,)),
        Hostile("a body over the limit", lambda port: _sent(port, head(body + 1), b" " * (body + 1)), (413,)),
        Hostile("a body over the limit, declared", lambda port: _sent(port, head(10**12)), (413,)),
        Hostile("a body over the limit, in chunks", lambda port: _sent(port, chunked, *pieces), (413,)),
        Hostile("a full queue", lambda port: _sent(port, head(len(f := json.dumps(flood).encode())) + f), (200, 429)),
        _cut("left in the head", lambda head, body: head[:20], reset=False),
        _cut("left in the head, reset", lambda head, body: head[:20], reset=True),
        _cut("left in the body", lambda head, body: head + body[:-9], reset=False),
        _cut("left in the body, reset", lambda head, body: head + body[:-9], reset=True),
        _cut("left before the reply", lambda head, body: head + body, reset=False, wait=0.1),
        _cut("left before the reply, reset", lambda head, body: head + body, reset=True, wait=0.1),
        _cut_stream(reset=False),
        _cut_stream(reset=True),
    ]


def lingering(question: Question) -> list[Hostile]:
    """Slow clients: two that the server does not wait for, which takes it half a minute, and one that comes through."""
    body = question.body_bytes(stream=False)
    size = len(body) // DRIPS + 1
    drips = [body[i : i + size] for i in range(0, len(body), size)]
    return [
        Hostile("silent", lambda port: _sent(port), (408,)),
        Hostile("a body without its end", lambda port: _sent(port, head(len(body)) + body[:-1]), (408,)),
        Hostile(
            "a slow body",
            lambda port: _sent(port, head(len(body), question.path), *drips, pause=DRIP_SECONDS),
            (200, 429),
            question.right,
        ),
    ]
