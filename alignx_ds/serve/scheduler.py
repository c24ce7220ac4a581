"""Continuous batching: one thread owns the model; requests join and leave its batch between two decoding steps."""

from __future__ import annotations

import copy
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.evaluation.sampling import Chosen, choose
from alignx_ds.models.ends import ends_of
from alignx_ds.runtime import console
from alignx_ds.runtime.failures import is_out_of_memory
from alignx_ds.serve.jobs import Failed, Finished, Job, Piece, Started
from alignx_ds.serve.metrics import Metrics
from alignx_ds.serve.report import report_of
from alignx_ds.serve.slots import Prefilled, Slots
from alignx_ds.serve.text import AnswerText

PREFILL_TOKENS = 2048  # of prompts that are read between two steps, so that running answers do not wait long
OUT_OF_MEMORY = "the server ran out of memory; try again later, or start it with fewer --slots or a smaller --context"
INTERNAL = "the server failed to answer; its console says why"


class QueueFullError(Exception):
    """No more jobs are accepted at the moment."""


@dataclass(eq=False)
class Running:
    """An answer that is being decoded."""

    job: Job
    choice: int
    draws: Random
    text: AnswerText
    tokens: list[int] = field(default_factory=list)
    unsent: str = ""
    unsent_tokens: list[Chosen] = field(default_factory=list)


class Scheduler:
    """Runs jobs on a model. `submit` and the properties may be used from any thread; the rest is its own thread's."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        metrics: Metrics,
        *,
        slots: int,
        context: int,
        queue: int,
    ) -> None:
        """Allocates the KV cache. `queue` jobs may wait beside those that run."""
        self._slots = Slots(model, slots, context)
        self._tokenizer = copy.deepcopy(tokenizer)  # fast tokenizers are not safe to share between threads
        self._ends = set(ends_of(model, tokenizer))
        self._experts: list[str] = list(getattr(model.config, "experts", []))
        self._metrics, self._queue = metrics, queue
        self._waiting: deque[Job] = deque()
        self._running: list[Running] = []  # by slot
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        metrics.watch(waiting=lambda: len(self._waiting), running=lambda: len(self._running))
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        with self._changed:
            return not self._waiting and not self._running

    def submit(self, jobs: list[Job]) -> None:
        """Raises QueueFullError if not all of them can wait."""
        with self._changed:
            if len(self._waiting) + len(jobs) > self._queue:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
            if len(self._waiting) + len(jobs) > self._queue:
                raise QueueFullError
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after its current step; jobs that are left get no more events."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
                if self._closed:
                    return
            self._leave([row for row, running in enumerate(self._running) if running.job.cancelled])
            self._admit()
            if self._running:
                try:
                    self._step()
                except Exception as error:  # noqa: BLE001 - whatever it is, other requests must still be served
                    self._fail({running.job for running in self._running}, error)
                    self._leave(list(range(len(self._running))))

    def _admit(self) -> None:
        """Read waiting prompts, in order, while there is room for all answers of the next one."""
        read = 0
        while (job := self._next()) is not None:
            try:
                self._start(job, self._slots.prefill(job.ids, job.needs))
            except Exception as error:  # noqa: BLE001 - likewise
                self._fail({job}, error)
                self._leave([row for row, running in enumerate(self._running) if running.job is job])
            read += len(job.ids)
            if read >= PREFILL_TOKENS:
                return

    def _next(self) -> Job | None:
        with self._changed:
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
            room = self._slots.count - len(self._running)
            return self._waiting.popleft() if self._waiting and self._waiting[0].n <= room else None

    def _start(self, job: Job, read: Prefilled) -> None:
        report = report_of(self._slots.model, read.routing, self._experts)
        self._metrics.prompt(len(job.ids), report)
        job.send(Started(report))
        for choice in range(job.n):
            self._slots.add(read)
            text = AnswerText(self._tokenizer, job.stop, prompt=job.ids, strip=job.strip)
            self._running.append(Running(job, choice, job.sampling.draws(choice), text))
        rows = list(range(len(self._running) - job.n, len(self._running)))
        self._take(rows, read.logits.expand(job.n, -1))

    def _step(self) -> None:
        started = time.perf_counter()
        logits = self._slots.step([running.tokens[-1] for running in self._running])
        self._take(list(range(len(self._running))), logits)
        self._metrics.step(time.perf_counter() - started)

    def _take(self, rows: list[int], logits: torch.Tensor) -> None:
        """The next token of these rows, and the end of those that it ends."""
        answers = [self._running[row] for row in rows]
        chosen = choose(logits, [(running.job.sampling, running.draws) for running in answers])
        self._metrics.tokens(len(rows))
        self._leave([row for row, one in zip(rows, chosen, strict=True) if self._extend(self._running[row], one)])

    def _extend(self, running: Running, chosen: Chosen) -> bool:
        """Add a token to an answer and send what is new of its text. Returns whether that was the last one."""
        job, text = running.job, running.text
        running.tokens.append(chosen.token)
        ended = chosen.token in self._ends
        if not ended:
            running.unsent += text.add(chosen.token)
            running.unsent_tokens.append(chosen)
        last = ended or text.stopped or len(running.tokens) >= job.max_tokens
        if last:
            running.unsent += text.finish()
        if (job.stream or last) and running.unsent_tokens:
            job.send(Piece(running.choice, running.unsent, tuple(running.unsent_tokens)))
            running.unsent, running.unsent_tokens = "", []
        if last:
            reason = "stop" if ended or text.stopped else "length"
            job.send(Finished(running.choice, reason, len(running.tokens)))
        return last

    def _leave(self, rows: list[int]) -> None:
        for row in sorted(rows, reverse=True):
            self._slots.remove(row)
            self._running[row] = self._running[-1]
            self._running.pop()

    def _fail(self, jobs: set[Job], error: Exception) -> None:
        out_of_memory = is_out_of_memory(error)
        if not out_of_memory:
            console.warn(f"a request failed:\n{''.join(traceback.format_exception(error))}")
        for job in jobs:
            job.send(Failed(OUT_OF_MEMORY if out_of_memory else INTERNAL))
