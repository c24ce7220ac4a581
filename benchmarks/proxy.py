"""What the router adds to a request of the server behind it, beside a prefill of the dense base.

    python benchmarks/proxy.py --shape medium --device cpu

Three servers with OpenAI's interface take turns in every round: one without a model, which answers at once; the router
(`alignx-ds serve MODEL --router-for URL`) in front of it; and the dense base behind our own server, which answers with
one token. The AlignX layers are the upper half, as in the recipes, so the router runs the lower half of the layers.
Every client asks one question after the other.

Columns: p50 of the requests' latencies, in milliseconds; what the router adds to the first; and that relative to the
base's, which is what a prefill alone costs there. The router decides in one thread, one prompt at a time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from suite import load, record, served_models
from suite.load import Body, Server
from suite.served_models import BASE, NEEDS, OURS
from suite.shapes import config_of

from alignx_ds.runtime import console

DIRECT, ROUTED = "no model", "router"
Latencies = dict[str, list[float]]  # by server: of all requests, in seconds


@contextmanager
def servers(args: argparse.Namespace) -> Iterator[dict[str, Server]]:
    """By name."""
    half = config_of(args.shape, args.layers, args.vocabulary).num_hidden_layers // 2
    axes = [axis for needs in NEEDS for axis in needs]
    with tempfile.TemporaryDirectory() as folder:
        paths, most = served_models.save(args, Path(folder), lowest=half), max(args.clients)
        limits = (most, most, max(args.prompts) + 1)
        behind = {DIRECT: ["-m", "suite.instant", *axes], BASE: served_models.command(paths[BASE], *limits)}
        with load.servers(behind) as started:
            url = f"http://127.0.0.1:{started[DIRECT].port}/v1"
            router = {ROUTED: served_models.command(paths[OURS], *limits, router_for=url)}
            with load.servers(router) as routers:
                yield started | routers


def requests(length: int, clients: int, each: int, random: Random) -> list[list[Body]]:
    """By client: prompts of random tokens."""
    prompts = [[[random.randrange(4, 600) for _ in range(length)] for _ in range(each)] for _ in range(clients)]
    return [[{"prompt": prompt, "max_tokens": 1} for prompt in client] for client in prompts]


def measure(started: dict[str, Server], length: int, clients: int, args: argparse.Namespace) -> Latencies:
    found: Latencies = {name: [] for name in started}
    for number in range(1 + args.repeats):
        asked = requests(length, clients, args.requests, Random(number))
        for name in list(started)[:: -1 if number % 2 else 1]:
            latencies = load.load(started[name], asked).latencies
            if number:  # the first round warms up
                found[name] += latencies
    return found


def row(length: int, clients: int, found: Latencies) -> list[str]:
    middle = {name: 1000 * median(latencies) for name, latencies in found.items()}
    added = middle[ROUTED] - middle[DIRECT]
    shown = (*(middle[name] for name in (DIRECT, ROUTED, BASE)), added)
    return [str(length), str(clients), *(f"{value:.1f}" for value in shown), f"{added / middle[BASE]:.2f}"]


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 128, 512], help="tokens (default: 32 128 512)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="(default: 1 8)")
    parser.add_argument("--requests", type=int, default=4, help="of a client in a round (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    args = parser.parse_args()
    points = [(length, clients) for length in args.prompts for clients in args.clients]
    with servers(args) as started:
        found = {point: measure(started, *point, args) for point in points}
    columns = ["tokens", "clients", *(f"{name}, ms" for name in (DIRECT, ROUTED, BASE)), "added, ms", "added / base"]
    console.table("What the router adds to a request", columns, [row(*point, one) for point, one in found.items()])
    content: list[dict[str, Any]] = [
        {"tokens": length, "clients": clients, "latencies": one} for (length, clients), one in found.items()
    ]
    path = record.write("proxy", args, {"points": content}, [])
    console.say(f"written: {path}")


if __name__ == "__main__":
    main()
