"""OpenAI's answers, whole or as the chunks of a stream, from the events of their jobs."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from alignx_ds.evaluation.sampling import Chosen
from alignx_ds.serve.jobs import Event, Finished, Job, Piece, Report, Started

DIGITS = 4  # of the numbers in the alignx field
Body = dict[str, Any]


class TokenNames:
    """The text of single tokens, for log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        own = copy.deepcopy(tokenizer)  # used from another thread
        self.of = lru_cache(maxsize=65536)(lambda token: str(own.decode([token])))


class Form(Protocol):
    """How one of OpenAI's endpoints writes its answers."""

    prefix: str  # of an answer's id
    whole: str  # the type of a whole answer
    chunk: str  # and of a stream's chunk

    def choice(self, names: TokenNames, text: str, tokens: Sequence[Chosen], start: int) -> Body:
        """Of a whole answer. `start` is the number of characters before, here and below."""

    def delta(self, names: TokenNames, text: str, tokens: Sequence[Chosen], start: int, first: bool) -> Body:
        """Of a chunk, which may be the `first` of its answer."""


class ChatForm:
    """/v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, names: TokenNames, text: str, tokens: Sequence[Chosen], start: int) -> Body:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(names, tokens)}

    def delta(self, names: TokenNames, text: str, tokens: Sequence[Chosen], start: int, first: bool) -> Body:
        delta = {"role": "assistant", "content": text} if first else {"content": text} if text or tokens else {}
        return {"delta": delta, "logprobs": self._logprobs(names, tokens)}

    def _logprobs(self, names: TokenNames, tokens: Sequence[Chosen]) -> Body | None:
        if not any(one.logprob is not None for one in tokens):
            return None

        def named(token: int, logprob: float | None) -> Body:
            text = names.of(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        listed = [
            named(one.token, one.logprob) | {"top_logprobs": [named(*likely) for likely in one.top]} for one in tokens
        ]
        return {"content": listed, "refusal": None}


class CompletionForm:
    """/v1/completions."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, names: TokenNames, text: str, tokens: Sequence[Chosen], start: int) -> Body:
        return {"text": text, "logprobs": self._logprobs(names, tokens, start)}

    def delta(self, names: TokenNames, text: str, tokens: Sequence[Chosen], start: int, first: bool) -> Body:
        return self.choice(names, text, tokens, start)

    def _logprobs(self, names: TokenNames, tokens: Sequence[Chosen], start: int) -> Body | None:
        if not any(one.logprob is not None for one in tokens):
            return None
        texts = [names.of(one.token) for one in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{names.of(token): logprob for token, logprob in one.top} for one in tokens],
            "text_offset": [start + len("".join(texts[:i])) for i in range(len(texts))],
        }


@dataclass
class _Choice:
    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    reason: str | None = None
    generated: int = 0
    begun: bool = False  # whether a chunk of it has been written


class Answers:
    """The answers to the jobs of one request. Every job has as many; they are numbered one job after the other."""

    def __init__(self, form: Form, jobs: Sequence[Job], model: str, names: TokenNames) -> None:
        self._form, self._jobs, self._names = form, jobs, names
        self._head = {"id": f"{form.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._choices = [_Choice() for job in jobs for _ in range(job.n)]
        self._reports: list[Report | None] = [None] * len(jobs)

    @property
    def done(self) -> bool:
        return all(choice.reason for choice in self._choices)

    def take(self, number: int, event: Event) -> Body | None:
        """Add an event of the job with this number to its answer; returns the chunk that a stream sends for it."""
        if isinstance(event, Started):
            self._reports[number] = event.report
            return None
        assert isinstance(event, (Piece, Finished))
        index = number * self._jobs[number].n + event.choice
        choice, first, start = self._choices[index], not self._choices[index].begun, len(self._choices[index].text)
        choice.begun = True
        text, tokens = (event.text, event.tokens) if isinstance(event, Piece) else ("", ())
        choice.text += text
        choice.tokens.extend(tokens)
        if isinstance(event, Finished):
            choice.reason, choice.generated = event.reason, event.tokens
        delta = self._form.delta(self._names, text, tokens, start, first)
        written = {"index": index, **delta, "finish_reason": choice.reason}
        made: Body = {**self._head, "object": self._form.chunk, "choices": [written]}
        return {**made, "alignx": _report(self._reports[number])} if first else made

    def usage(self) -> Body:
        prompt, generated = sum(len(job.ids) for job in self._jobs), sum(c.generated for c in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def usage_chunk(self) -> Body:
        return {**self._head, "object": self._form.chunk, "choices": [], "usage": self.usage()}

    def body(self) -> Body:
        """The whole answer. Where there are several prompts, each choice has its own `alignx`."""
        choices = []
        for index, choice in enumerate(self._choices):
            written = {"index": index, **self._form.choice(self._names, choice.text, choice.tokens, 0)}
            choices.append({**written, "finish_reason": choice.reason})
            if len(self._jobs) > 1:
                choices[-1]["alignx"] = _report(self._reports[index // self._jobs[0].n])
        made = {**self._head, "object": self._form.whole, "choices": choices, "usage": self.usage()}
        return made if len(self._jobs) > 1 else {**made, "alignx": _report(self._reports[0])}


def _report(report: Report | None) -> Body | None:
    """The alignx field; null for a dense model."""
    if report is None:
        return None
    return {
        "gates": {name: round(gate, DIGITS) for name, gate in report.gates.items()},
        "confidence": round(report.confidence, DIGITS),
        "distance": round(report.distance, DIGITS),
    }
