"""What the HTTP layer and the scheduler pass to each other: jobs one way, events of their answers the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from alignx_ds.evaluation.sampling import Chosen, Sampling


@dataclass(frozen=True)
class Report:
    """How a prompt was routed: what an answer's `alignx` field says."""

    gates: dict[str, float]  # the experts' weights in the answer
    confidence: float
    distance: float


@dataclass(frozen=True)
class Started:
    """The prompt has been read. Without a report, the model is dense."""

    report: Report | None


@dataclass(frozen=True)
class Piece:
    """More of an answer; of its text, only what can no longer change."""

    choice: int
    text: str
    tokens: tuple[Chosen, ...]


@dataclass(frozen=True)
class Finished:
    """An answer's end: "stop" at an end token or a stop string, "length" at the limit. `tokens` were generated."""

    choice: int
    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The job ends without an answer."""

    message: str


Event = Started | Piece | Finished | Failed


@dataclass(eq=False)
class Job:
    """One prompt and its `n` answers. `send` is called from the scheduler's thread with every event, in order."""

    ids: list[int]
    send: Callable[[Event], None]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 16
    n: int = 1
    stop: tuple[str, ...] = ()
    needs: list[float] | None = None  # of every axis, instead of the gate's decision
    strip: bool = False  # leave out white space around the answers, which do not continue the prompt's text
    stream: bool = False  # send pieces as they come, not one with the whole answer
    cancelled: bool = False  # set from any thread: nobody waits for the answers any more
