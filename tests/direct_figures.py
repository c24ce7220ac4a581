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
