"""Figures of a router by their definitions, decision by decision in plain Python."""

from __future__ import annotations

import math

from alignx_ds.routing.metrics import BINS


def direct_figures(gates: list[list[list[float]]], labels: list[int], names: list[str]) -> dict[str, float]:
    """By tag, of gates[gate][row][expert]."""
    asked = [(row, label) for gate in gates for row, label in zip(gate, labels, strict=True)]
    found = {"router/entropy": sum(-p * math.log(p) for row, _ in asked for p in row if p > 0) / len(asked)}
    for e, name in enumerate(names):
        found[f"router/gate/{name}"] = sum(row[e] for row, _ in asked) / len(asked)
        found[f"router/share/{name}"] = sum(row[e] == max(row) for row, _ in asked) / len(asked)
        own = [row[e] == max(row) for row, label in asked if label == e]
        if own:
            found[f"router/own/{name}"] = sum(own) / len(own)
    bins: dict[int, list[float]] = {}
    for row, label in asked:
        gap = max(row) - (row[label] == max(row))
        bins.setdefault(min(BINS - 1, int(max(row) * BINS)), []).append(gap)
    found["router/ece"] = sum(abs(sum(gaps)) for gaps in bins.values()) / len(asked)
    return found


def direct_needs(odds: list[list[list[float]]], sets: list[list[int]], names: list[str]) -> dict[str, float]:
    """The same of gates for needs: odds[gate][row][axis] are log-odds, sets[row][expert] is 1 for what a row needs.

    The generalist is chosen where no axis has a probability above a half, and its gate is the probability of no axis.
    """
    asked = [(row, needed) for gate in odds for row, needed in zip(gate, sets, strict=True)]
    yes = [[1 / (1 + math.exp(-x)) for x in row] for row, _ in asked]
    gates = [[math.prod(1 - p for p in row), *row] for row in yes]
    chosen = [[all(x <= 0 for x in row), *(x > 0 for x in row)] for row, _ in asked]
    entropies = [-p * math.log(p) - (1 - p) * math.log(1 - p) for row in yes for p in row]
    found = {"router/entropy": sum(entropies) / len(asked)}
    for e, name in enumerate(names):
        found[f"router/gate/{name}"] = sum(row[e] for row in gates) / len(asked)
        found[f"router/share/{name}"] = sum(row[e] for row in chosen) / len(asked)
        own = [row[e] for row, (_, needed) in zip(chosen, asked, strict=True) if needed[e]]
        if own:
            found[f"router/own/{name}"] = sum(own) / len(own)
    eces = []
    for axis in range(len(names) - 1):
        bins: dict[int, list[float]] = {}
        for row, (_, needed) in zip(yes, asked, strict=True):
            bins.setdefault(min(BINS - 1, int(row[axis] * BINS)), []).append(row[axis] - needed[axis + 1])
        eces.append(sum(abs(sum(gaps)) for gaps in bins.values()) / len(asked))
    found["router/ece"] = sum(eces) / len(eces)
    return found
