"""The server's metrics in Prometheus's text format, at /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from alignx_ds.serve.jobs import Report

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
CONFIDENCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
DISTANCES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)


class Metrics:
    """Counted from any thread; each server has its own."""

    def __init__(self, experts: list[str]) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter("alignx_requests", "HTTP requests answered", ["path", "status"], registry=own)
        self._seconds = Histogram(
            "alignx_request_seconds",
            "From a request's headers to the end of its answer",
            ["path"],
            buckets=SECONDS,
            registry=own,
        )
        self.first_token = Histogram(
            "alignx_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=own
        )
        self._steps = Histogram(
            "alignx_step_seconds", "One decoding step of the whole batch", buckets=STEP_SECONDS, registry=own
        )
        self._prompt_tokens = Counter("alignx_prompt_tokens", "Tokens of the prompts that were read", registry=own)
        self._answer_tokens = Counter("alignx_answer_tokens", "Tokens that were generated", registry=own)
        self._prompts = Counter("alignx_prompts", "Prompts that were read", registry=own)
        self._waiting = Gauge("alignx_waiting_prompts", "Prompts that wait for a slot", registry=own)
        self._running = Gauge("alignx_running_answers", "Answers that are being decoded", registry=own)
        self._gates = Counter("alignx_gate", "Sum of the gates of all prompts", ["expert"], registry=own)
        self._confidence = Histogram(
            "alignx_gate_confidence", "Of the gate, by prompt", buckets=CONFIDENCES, registry=own
        )
        self._distance = Histogram(
            "alignx_gate_distance", "From the nearest expert's own prompts, by prompt", buckets=DISTANCES, registry=own
        )
        self.routing = Histogram(
            "alignx_routing_seconds", "From a prompt to its gate's decision, in a router", buckets=SECONDS, registry=own
        )
        self._passed_on = Counter("alignx_passed_on", "Requests that a router passed on", ["model"], registry=own)
        for expert in experts:
            self._gates.labels(expert)

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def request(self, path: str, status: int, seconds: float) -> None:
        """An HTTP request; a `status` of 0 means that its client left before the answer began."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def prompt(self, tokens: int, report: Report | None) -> None:
        self._prompts.inc()
        self._prompt_tokens.inc(tokens)
        if report is not None:
            for expert, gate in report.gates.items():
                self._gates.labels(expert).inc(gate)
            self._confidence.observe(report.confidence)
            self._distance.observe(report.distance)

    def passed_on(self, model: str) -> None:
        self._passed_on.labels(model).inc()

    def tokens(self, count: int) -> None:
        self._answer_tokens.inc(count)

    def step(self, seconds: float) -> None:
        self._steps.observe(seconds)

    def text(self) -> bytes:
        text: bytes = generate_latest(self._registry)
        return text
