"""A served AlignX model beside its dense base and H3Fusion behind the same server: requests/s, tokens/s, latency.

    python benchmarks/serving.py --shape medium --device cpu

All are models with random weights in a server process of their own; those that are not asked do nothing. Every
client asks one question after the other: a prompt of random tokens, and an answer of a fixed length. AlignX's requests
go to the generalist and the axes in turn (`axes`), so that every batch mixes them. The systems take turns in every
round; a ratio is the median of the rounds' own ratios. H3Fusion has its three full FFNs in every layer, grouped.

Columns: requests and tokens per second (medians of the rounds), p50 and p99 of all requests' latencies, and AlignX's
tokens per second over the other's, by the clock and by the server's CPU time. On a machine that others use too the
second is the steadier one; on a GPU it says little.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

from suite import load, record, served_models
from suite.load import Body, Load, Server
from suite.record import Target
from suite.served_models import BASE, NEEDS, OURS
from suite.systems import AXES

from alignx_ds.runtime import console

FUSION = "H3Fusion"
GOALS = {BASE: 0.9, FUSION: 1.4}  # AlignX's tokens/s over theirs
CONTEXT = 256
Rounds = dict[str, list[Load]]  # by system


@contextmanager
def servers(args: argparse.Namespace) -> Iterator[dict[str, Server]]:
    """By system."""
    with tempfile.TemporaryDirectory() as folder:
        paths, most = served_models.save(args, Path(folder)), max(args.clients)
        commands = {name: served_models.command(path, most, most, CONTEXT) for name, path in paths.items()}
        if args.fusion:
            commands[FUSION] = ["-m", "suite.serve_fusion", str(paths[BASE]), str(AXES), str(most), str(CONTEXT)]
        with load.servers(commands) as started:
            yield started


def requests(clients: int, args: argparse.Namespace, seed: int, *, mixed: bool) -> list[list[Body]]:
    """By client. The same prompts for all systems, other ones in every round."""
    random, made = Random(seed), []
    for client in range(clients):
        bodies = []
        for number in range(args.requests):
            prompt = [random.randrange(4, 600) for _ in range(random.randint(args.prompt // 2, args.prompt))]
            axes = {"axes": NEEDS[(client + number) % len(NEEDS)]} if mixed else {}
            bodies.append({"prompt": prompt, "max_tokens": args.tokens, **axes})
        made.append(bodies)
    return made


def measure(started: dict[str, Server], clients: int, args: argparse.Namespace) -> Rounds:
    found: Rounds = {name: [] for name in started}
    for number in range(1 + args.repeats):
        for name in list(started)[:: -1 if number % 2 else 1]:
            asked = requests(clients, args, number, mixed=name == OURS)
            found[name].append(load.load(started[name], asked))
    return {name: rounds[1:] for name, rounds in found.items()}  # the first warms up


def ratio(rounds: Rounds, other: str = BASE) -> float:
    """AlignX's tokens/s over the other's, by the clock."""
    pairs = zip(rounds[OURS], rounds[other], strict=True)
    return median(ours.tokens_per_second / base.tokens_per_second for ours, base in pairs)


def cpu_ratio(rounds: Rounds, other: str = BASE) -> float:
    """By the servers' CPU time."""
    pairs = zip(rounds[OURS], rounds[other], strict=True)
    return median(ours.tokens_per_cpu_second / base.tokens_per_cpu_second for ours, base in pairs)


def percentiles(rounds: list[Load]) -> tuple[float, float]:
    """p50 and p99 of the latencies, in seconds."""
    latencies = [latency for one in rounds for latency in one.latencies]
    cuts = quantiles(latencies, n=100, method="inclusive")
    return cuts[49], cuts[98]


def row(clients: int, name: str, rounds: Rounds) -> list[str]:
    p50, p99 = percentiles(rounds[name])
    rates = (median(one.requests_per_second for one in rounds[name]), median(o.tokens_per_second for o in rounds[name]))
    compared = ["", ""] if name == OURS else [f"{ratio(rounds, name):.3f}", f"{cpu_ratio(rounds, name):.3f}"]
    return [name, str(clients), f"{rates[0]:.2f}", f"{rates[1]:.1f}", f"{p50:.2f}", f"{p99:.2f}", *compared]


def content(found: dict[int, Rounds]) -> list[dict[str, Any]]:
    return [
        {
            "clients": clients,
            "system": name,
            "seconds": [one.seconds for one in loads],
            "cpu_seconds": [one.cpu_seconds for one in loads],
            "tokens": [one.tokens for one in loads],
            "latencies": [one.latencies for one in loads],
        }
        for clients, rounds in found.items()
        for name, loads in rounds.items()
    ]


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--requests", type=int, default=2, help="of a client in a round (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=64, help="greatest tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--fusion", action="store_true", help="H3Fusion too")
    args = parser.parse_args()
    with servers(args) as started:
        found = {clients: measure(started, clients, args) for clients in args.clients}
    rows = [row(clients, name, rounds) for clients, rounds in found.items() for name in rounds]
    columns = ["system", "clients", "requests/s", "tokens/s", "p50 s", "p99 s", "AlignX / it", "by CPU time"]
    console.table("Served, mixed axes", columns, rows)
    met = [
        Target(f"{clients} clients: tokens/s over the {name}'s", ratio(r, name), goal, at_least=True)
        for clients, r in found.items()
        for name, goal in GOALS.items()
        if name in r
    ]
    record.print_targets(met)
    load_of_clients = {name: getattr(args, name) for name in ("requests", "prompt", "tokens")}
    path = record.write("serving", args, {"load": load_of_clients, "points": content(found)}, met)
    console.say(f"written: {path}")


if __name__ == "__main__":
    main()
