"""Clients of a server: each asks one question after the other, as the next one is answered."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import IO, Any

import psutil

Body = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A server's port and its process."""

    port: int
    process: psutil.Process
    console: IO[str] | None = None  # what it says after the line with its port

    def cpu_seconds(self) -> float:
        """That it has used since it was started."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@dataclass(frozen=True)
class Load:
    """What the clients saw in one round."""

    seconds: float  # of the whole round
    latencies: list[float]  # seconds of every request
    tokens: int  # that were generated
    cpu_seconds: float  # of the server

    @property
    def requests_per_second(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def tokens_per_cpu_second(self) -> float:
        """What other processes on the machine change least."""
        return self.tokens / self.cpu_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@contextmanager
def servers(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Server]]:
    """A process for each command of this interpreter, on its import path; it says where it listens as `serve` does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = {
        name: subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)
        for name, command in commands.items()
    }
    try:
        yield {n: Server(_port(p), psutil.Process(p.pid), p.stderr) for n, p in processes.items()}
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait(60)


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"http://[\d.]+:(\d+)/v1", line)
    if found is None:
        raise RuntimeError(line + process.stderr.read())
    return int(found[1])


def load(server: Server, clients: Sequence[Sequence[Body]]) -> Load:
    """Every client sends its completion requests one after the other, all clients at once."""
    with ThreadPoolExecutor(len(clients)) as threads:
        started, used = time.perf_counter(), server.cpu_seconds()
        answered = [one for client in threads.map(lambda bodies: _ask(server.port, bodies), clients) for one in client]
        seconds = time.perf_counter() - started
    tokens = sum(tokens for _, tokens in answered)
    return Load(seconds, [latency for latency, _ in answered], tokens, server.cpu_seconds() - used)


def _ask(port: int, bodies: Sequence[Body]) -> list[tuple[float, int]]:
    """The latency of each request, and the tokens of its answer."""
    connection, found = HTTPConnection("127.0.0.1", port, timeout=600), []
    for body in bodies:
        started = time.perf_counter()
        text = json.dumps({"model": "model", "temperature": 0, **body})
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        found.append((time.perf_counter() - started, answer["usage"]["completion_tokens"]))
    connection.close()
    return found
