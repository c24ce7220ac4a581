"""Decisions made by hand."""

from __future__ import annotations

import math

import torch

from alignx_ds.mocae.serving import gates_of_needs
from alignx_ds.study.explain.choices import Candidate, Choice, Word


def chosen(*confidences: float, top: int = 1) -> Choice:
    """A decision with these confidences, whose logits are 2·parts."""
    names = ["helpful", "harmless", "honest", "generalist"]
    made = [
        Candidate(n, {"linear": math.log(c) / 2 - 3, "lexical": 3.0}, math.log(c), c, 1 / top if i < top else 0.0)
        for i, (n, c) in enumerate(zip(names, confidences, strict=False))
    ]
    return Choice(2, [2, 3], 0.5, made, [], [Word(" dog", 0.5), Word("cat", -0.25)], 0.125)


def needed(*needs: float) -> Choice:
    """A decision with these probabilities of need, whose logits are 2·parts."""
    odds = [math.log(need / (1 - need)) for need in needs]
    gates = gates_of_needs(torch.tensor(needs))[1:].tolist()
    made = [
        Candidate(name, {"linear": logit / 2 - 1, "lexical": 1.0}, logit, need, gate)
        for name, logit, need, gate in zip(("helpful", "harmless", "honest"), odds, needs, gates, strict=False)
    ]
    return Choice(2, [2, 3], 0.5, made, [], [Word("dog", 0.75)], 0.25, "needs")
