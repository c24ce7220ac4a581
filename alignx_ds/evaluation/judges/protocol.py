"""What every judge is: a verdict per answer, which can be kept and resumed, and metrics over the verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from alignx_ds.data.rows import Row

Verdict = dict[str, Any]  # what a judge says of one answer; goes to a JSON line
Metrics = dict[str, float]  # "score" is the headline: percent, higher is better


class Judge(Protocol):
    """Judges answers that were written before, on any machine, at any time."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that a verdict depends on beside row and answer: the judge's model, its prompt, its threshold."""

    def verdicts(self, rows: Sequence[Row], answers: Sequence[str]) -> Iterator[Verdict]:
        """One verdict per answer, in order, as soon as it is known: who stops in between has lost nothing."""

    def metrics(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Metrics:
        """The metrics of all verdicts, among them "score"."""


def percent(hits: Sequence[bool]) -> float:
    """100 · mean; 0 for none."""
    return 100.0 * sum(hits) / len(hits) if hits else 0.0
