"""What every judge has: a verdict on each answer, which is stored, and metrics over all verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from alignx_ds.data.rows import Row

Verdict = dict[str, Any]  # on one answer; a JSON line of the file of verdicts
Metrics = dict[str, float]  # by name; "score" is the main one: percent, higher is better
BESIDE = ("benign_served", "length_controlled")  # are shown beside the scores of the axes that have them
JUDGE_PREFIX = "judge_"  # of metrics that a judge has measured of itself
KIND = "kind/"  # begins the names of metrics that are the score of one kind of rows


class Judge(Protocol):
    """Judges answers that are on disk already, so on any machine and at any time."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that a verdict depends on besides row and answer: the judge's model, its prompt, its threshold."""

    def applies(self, row: Row) -> bool:
        """Whether the row has what a verdict needs, e.g. a reference. Asked of the rows of other axes than its own."""

    def verdicts(self, rows: Sequence[Row], answers: Sequence[str]) -> Iterator[Verdict]:
        """One verdict per answer, in order, each as soon as it is known, so that it can be stored at once."""

    def metrics(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Metrics:
        """Metrics over all verdicts, among them "score".

        On rows of another axis, too, the score says how far the answers are what this judge asks for, no more and no
        less: a safety judge counts a harmless request that is refused as well as one that is answered with harm.
        """


@runtime_checkable
class Graded(Protocol):
    """A judge whose verdicts hold more than its score counts: a probability beside the yes or no."""

    def grade(self, verdict: Verdict) -> float:
        """0–100, higher is better: of one answer. Best-of-n tells answers apart by it."""


def percent(hits: Sequence[bool]) -> float:
    """100 · mean; 0 for none."""
    return 100.0 * sum(hits) / len(hits) if hits else 0.0


def label(metric: str) -> str:
    """A metric's name in tables: "benign served" for "benign_served", "category: drugs, weapons" for its key."""
    return metric.replace("_", " ").replace("/", ": ").replace(",", ", ")


def set_columns(by_system: Mapping[str, Metrics]) -> list[str]:
    """The metrics of an extra question set. Some systems may lack some: HoneSet has one per category that was asked."""
    every = dict.fromkeys(key for metrics in by_system.values() for key in metrics)
    return [key for key in every if not key.startswith(JUDGE_PREFIX)]
