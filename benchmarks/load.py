"""A server under load for minutes: good requests, broken ones, and what its process holds on to.

    python benchmarks/load.py --minutes 10

A tiny AlignX model with random weights in a server process of its own (`suite/served_models.py`). Its clients ask, one
question after the other, of both endpoints, streamed and not, for the gate's choice and for every axis, one answer and
two, with a stop and without (`suite/questions.py`). The right replies are those that the server gave while it was idle.
Beside them others send what has to be refused, send slowly, and leave in the middle (`suite/hostile.py`).

It ends with exit code 1 where a good request was lost or answered otherwise than before, where another one did not get
a reply that explains itself, where memory or open files grow, where the queue is not empty in the end, or where SIGTERM
does not end the server with code 0 after the answer that runs. The JSON has all kinds of replies, and the samples.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.request import urlopen

from suite import load, record, served_models
from suite.growth import Growth, Watch
from suite.hostile import Hostile, hostile, lingering
from suite.load import Server
from suite.questions import Client, Question, Reply, questions
from suite.record import Target
from suite.shapes import SMALL

from alignx_ds.runtime import console

CONTEXT, SLOTS, QUEUE, MAX_BODY = 256, 8, 16, 1_000_000
QUESTIONS, TOKENS = 32, 32
BROKEN_CLIENTS, SLOW_CLIENTS = 2, 10
PAUSE = 0.2  # seconds between two broken requests of a client
SLOWEST = 35.0  # seconds that a slow client may take: the server waits for 30
QUIET_SECONDS = 15.0  # within which everything has to have left the server
GAUGES = ("alignx_running_answers", "alignx_waiting_prompts")
MOST_MEGABYTES = 16.0  # that memory may grow after the warm-up: the allocator's own ups and downs


@dataclass
class Tally:
    """What was sent and what came back, from any thread."""

    replies: Counter[tuple[str, int, str, bool]] = field(default_factory=Counter)  # sent, status, said, as it should be
    latencies: list[float] = field(default_factory=list)  # seconds of the good requests
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, sent: str, reply: Reply, *, right: bool, seconds: float | None = None) -> None:
        with self._lock:
            self.replies[sent, reply.status, reply.said, right] += 1
            if seconds is not None:
                self.latencies.append(seconds)

    def wrong(self, *, good: bool) -> int:
        """Good requests that were lost or answered wrongly, or else broken ones without an explanation."""
        return sum(n for (sent, *_, right), n in self.replies.items() if not right and sent.startswith("good") == good)

    def rows(self) -> list[dict[str, Any]]:
        names = ("sent", "status", "said", "right")
        return [dict(zip(names, key, strict=True)) | {"count": n} for key, n in sorted(self.replies.items())]


@dataclass(frozen=True)
class Found:
    tally: Tally
    growth: Growth
    files: int  # that are open in the end and were not in the beginning
    left: float  # answers that run and prompts that wait in the end
    exit_code: int  # after SIGTERM
    last: bool  # whether the answer that ran then was whole
    said: str  # by the server, on its console


def good(port: int, asked: Sequence[Question], tally: Tally, random: Random, until: float) -> None:
    """One client's questions, until then."""
    client = Client(port)
    while time.monotonic() < until:
        question, stream = random.choice(asked), random.random() < 0.5
        started = time.perf_counter()
        reply = client.ask(question, stream=stream)
        name = f"good: {question.path}{', streamed' if stream else ''}"
        if reply.status == 429:  # broken clients fill the queue now and then
            tally.add(name, reply, right=bool(reply.said))
            time.sleep(random.random())
            continue
        right = reply == question.right
        shown = reply if right or reply.said else Reply(reply.status, f"{reply} and not {question.right}")
        tally.add(name, shown, right=right, seconds=time.perf_counter() - started)
    client.close()


def broken(port: int, kinds: Sequence[Hostile], tally: Tally, random: Random, until: float, pause: float) -> None:
    """One client that sends every kind in turn, until then."""
    while time.monotonic() < until:
        for kind in random.sample(kinds, len(kinds)):
            if time.monotonic() >= until:
                return
            reply = kind.send(port)
            tally.add(kind.name, reply, right=kind.explained(reply))
            time.sleep(pause * 2 * random.random())


def run(server: Server, minutes: float, clients: int) -> Found:
    """Load the server for so long, and end it."""
    first = Client(server.port)
    asked = questions(first, Random(0), QUESTIONS, TOKENS)
    first.close()
    tally, port = Tally(), server.port
    time.sleep(1)
    before, end = server.process.num_fds(), time.monotonic() + 60 * minutes
    kinds = hostile(CONTEXT, SLOTS, QUEUE, MAX_BODY)
    work: list[Callable[[Random], None]] = [lambda r: good(port, asked, tally, r, end)] * clients
    work += [lambda r: broken(port, kinds, tally, r, end, PAUSE)] * BROKEN_CLIENTS
    work += [lambda r: broken(port, lingering(r.choice(asked)), tally, r, end - SLOWEST, PAUSE)] * SLOW_CLIENTS
    with Watch(server.process) as watch, ThreadPoolExecutor(len(work)) as threads:
        for one in [threads.submit(do, Random(number)) for number, do in enumerate(work)]:
            one.result()
    left = quiet(server, before)
    last, code = drained(server, asked[0])
    said = server.console.read() if server.console else ""
    return Found(tally, watch.growth(), left[0] - before, left[1], code, last, said)


def quiet(server: Server, files: int) -> tuple[int, float]:
    """Open files, and answers and prompts in the server, once they are no more than before, or after a while."""
    end = time.monotonic() + QUIET_SECONDS
    while True:
        found = server.process.num_fds(), held(server)
        if (found[0] <= files and not found[1]) or time.monotonic() > end:
            return found
        time.sleep(0.5)


def held(server: Server) -> float:
    """Answers that run and prompts that wait in the server."""
    with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=QUIET_SECONDS) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(GAUGES))


def drained(server: Server, question: Question) -> tuple[bool, int]:
    """SIGTERM while a question is answered: whether that answer was right, and the exit code."""
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(Client(server.port).ask, question, stream=True)
        while not (held(server) or asked.done()):
            time.sleep(0.001)
        server.process.terminate()
        return asked.result() == question.right, server.process.wait(60)


def targets(found: Found) -> list[Target]:
    stderr = [line for line in found.said.splitlines() if "no more requests are accepted" not in line]
    return [
        Target("good requests lost, or answered wrongly", found.tally.wrong(good=True), 0),
        Target("other requests without their explanation", found.tally.wrong(good=False), 0),
        Target("growth of memory after the warm-up, MB", found.growth.megabytes, MOST_MEGABYTES),
        Target("files open in the end, above those in the beginning", found.files, 0),
        Target("answers and prompts in the server in the end", found.left, 0),
        Target("exit code after SIGTERM", abs(found.exit_code), 0),
        Target("answers lost at SIGTERM", not found.last, 0),
        Target("other lines on the server's console", len(stderr), 0),
    ]


def content(found: Found, args: argparse.Namespace) -> dict[str, Any]:
    latencies = sorted(found.tally.latencies)
    return {
        "minutes": args.minutes,
        "clients": args.clients,
        "requests": found.tally.replies.total(),
        "latency_seconds": {f"p{p}": latencies[(len(latencies) - 1) * p // 100] for p in (50, 99, 100)},
        "replies": found.tally.rows(),
        "growth": found.growth.record(),
        "console": found.said,
    }


def main() -> int:
    parser = record.parser(__doc__, shape="tiny")
    parser.add_argument("--minutes", type=float, default=10, help="of load (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="that ask good questions (default: %(default)s)")
    parser.set_defaults(vocabulary=SMALL["world"].vocabulary)  # of the tokenizer: every token has a text
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = served_models.save(args, Path(folder))[served_models.OURS]
        command = served_models.command(path, SLOTS, QUEUE, CONTEXT)
        with load.servers({served_models.OURS: command}) as started:
            found = run(started[served_models.OURS], args.minutes, args.clients)
    rows = [[r["sent"], str(r["status"]), str(r["count"]), r["said"][:80]] for r in found.tally.rows()]
    console.table("Replies", ["sent", "status", "count", "said"], rows)
    met = targets(found)
    record.print_targets(met)
    console.say(f"written: {record.write('load', args, content(found, args), met)}")
    return int(not all(target.met for target in met))


if __name__ == "__main__":
    sys.exit(main())
