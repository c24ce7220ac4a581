"""A cost model of a training step: compute by token, communication by call (α) and by byte (β).

    T = κ (fixed + c·n) + Σ over kinds of (α·calls + β·bytes)

κ is how much slower a rank computes while all ranks of its world do than it does alone: ranks on one CPU share caches
and memory, those on GPUs nothing. It is measured without communication. n is the number of tokens that a rank computes
in a step, padding included; under expert parallelism, of slots of one expert that it dispatches: its tokens, padded to
the fullest rank's. The model is fitted to measurements and tested on one that is left out; `suite.cluster` extrapolates
it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

ALL_TO_ALL, ALL_REDUCE = "all-to-all", "all-reduce"


@dataclass(frozen=True)
class Link:
    """Cost of a message: α seconds per call, β seconds per byte."""

    alpha: float
    beta: float

    def seconds(self, calls: float, size: float) -> float:
        return self.alpha * calls + self.beta * size


@dataclass(frozen=True)
class Traffic:
    """What one rank passes to the collectives of one kind in a step."""

    calls: float
    size: float  # bytes, of all calls together


@dataclass(frozen=True)
class Compute:
    """Seconds of a step without communication."""

    fixed: float
    per_slot: float

    def seconds(self, slots: float) -> float:
        return self.fixed + self.per_slot * slots


def fit_link(sizes: Iterable[float], seconds: Iterable[float]) -> Link:
    """Non-negative α and β with the least squared relative errors.

    With absolute errors the largest messages alone would decide.
    """
    s, t = np.asarray(list(sizes), float), np.asarray(list(seconds), float)
    alpha, beta = _non_negative(np.stack([np.ones_like(s), s], axis=1) / t[:, None])
    return Link(alpha, beta)


def fit_compute(slots: Iterable[float], seconds: Iterable[float]) -> Compute:
    n, t = np.asarray(list(slots), float), np.asarray(list(seconds), float)
    fixed, per_slot = _non_negative(np.stack([np.ones_like(n), n], axis=1) / t[:, None])
    return Compute(fixed, per_slot)


def _non_negative(columns: np.ndarray) -> tuple[float, float]:
    """x ≥ 0 with columns·x closest to one."""
    from scipy.optimize import nnls

    scale = columns.max(axis=0)  # bytes and calls differ by orders of magnitude
    found, _ = nnls(columns / scale, np.ones(len(columns)))
    first, second = found / scale
    return float(first), float(second)


def communication(traffic: dict[str, Traffic], links: dict[str, Link]) -> float:
    """Seconds of a step's collectives, none of them hidden behind compute."""
    return sum(links[kind].seconds(t.calls, t.size) for kind, t in traffic.items() if t.calls)


def dispatched_bytes(capacity: int, experts: int, hidden: int, element: int, directions: int) -> int:
    """Bytes that one rank passes to the all-to-alls of one layer."""
    return capacity * experts * hidden * element * directions


World = dict[str, Any]  # ranks, links (the microbenchmark by kind), points, alone (milliseconds by round)
Point = dict[str, Any]  # stage, rows, tokens, slots, traffic by kind, milliseconds of each round


def of_stage(worlds: list[World], stage: str) -> list[World]:
    """The worlds with the points of this stage alone."""
    return [{**w, "points": [p for p in w["points"] if p["stage"] == stage]} for w in worlds]


class Fit:
    """The model fitted to measured worlds, without the largest batch on the most ranks."""

    def __init__(self, worlds: list[World]) -> None:
        self.links = {
            w["ranks"]: {kind: fit_link(*zip(*seen, strict=True)) for kind, seen in w["links"].items()} for w in worlds
        }
        passes = {w["ranks"]: float(min(w["alone"])) for w in worlds}
        self.slower = {n: max(1.0, found / passes.get(1, found)) for n, found in passes.items()}  # κ
        most = max(worlds, key=lambda w: int(w["ranks"]))
        self.left_out = (most["ranks"], max(p["rows"] for p in most["points"]))
        points = [(w["ranks"], p) for w in worlds for p in w["points"]]
        kept = [(n, p) for n, p in points if (n, p["rows"]) != self.left_out]
        alone = [max(fastest(p) - self.communication(n, p), 1e-6) / self.slower[n] for n, p in kept]
        self.compute = fit_compute([p["slots"] for _, p in kept], alone)

    def communication(self, ranks: int, point: Point) -> float:
        """Seconds of the step's collectives."""
        return communication({k: Traffic(**t) for k, t in point["traffic"].items()}, self.links[ranks])

    def predicted(self, ranks: int, point: Point) -> float:
        return self.slower[ranks] * self.compute.seconds(point["slots"]) + self.communication(ranks, point)

    def error(self, ranks: int, point: Point) -> float:
        return self.predicted(ranks, point) / fastest(point) - 1


def fastest(point: Point) -> float:
    """Seconds of the fastest round, which other processes have disturbed least."""
    return float(min(point["milliseconds"])) / 1000


def rate(point: Point) -> float:
    """Tokens a second over all ranks, at the median."""
    return 1000 * float(point["tokens"] / median(point["milliseconds"]))
