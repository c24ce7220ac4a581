"""Which experts an export merges, and how much of each: `helpful`, `helpful,harmless` or `helpful=0.5,honest=0.5`."""

from __future__ import annotations

from math import isfinite, nan

from alignx_ds.errors import ConfigError, Problem

KEY, FORM = "--axes, --weights", "axis=weight pairs, as helpful=0.5,honest=0.5"
Weights = dict[str, float]  # by axis: how much of its change is added to the base model


def parse_weights(text: str, axes: list[str]) -> Weights:
    """Axes, which share a weight of 1, or axis=weight pairs. Raises ConfigError with every problem found.

    So a prompt that needs several axes as a whole is served in the mixture (mocae/serving.py).
    """
    found: Weights = {}
    problems = []
    parts = text.split(",")
    share = 1.0 / max(1, sum("=" not in part for part in parts))
    for part in parts:
        axis, equals, given = part.strip().partition("=")
        try:
            weight = float(given) if equals else share
        except ValueError:
            weight = nan
        if axis not in axes:
            problems.append(Problem(KEY, part, f"an axis of the run ({', '.join(axes)})", "correct the name"))
        elif not isfinite(weight) or axis in found:
            problems.append(Problem(KEY, part, FORM, "give each axis once, with a finite number after an ="))
        found[axis] = weight
    if problems:
        raise ConfigError(*problems)
    return found


def described(weights: Weights) -> str:
    """As a sum: "helpful + 0.5 · honest"."""
    return " + ".join(axis if weight == 1 else f"{weight:g} · {axis}" for axis, weight in weights.items())
