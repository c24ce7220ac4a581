"""Answers on their way from the scheduler's thread to a client, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import StreamingResponse

from alignx_ds.serve.answers import Answers
from alignx_ds.serve.jobs import Event, Failed, Job
from alignx_ds.serve.protocol import ApiError


class Mailbox:
    """Takes the events of jobs from the scheduler's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def sender(self, number: int) -> Callable[[Event], None]:
        return lambda event: self._send(number, event)

    def _send(self, number: int, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def get(self) -> tuple[int, Event]:
        """The next event and its job's number. Raises ApiError where a job has failed."""
        number, event = await self._events.get()
        if isinstance(event, Failed):
            raise ApiError(500, event.message)
        return number, event


class EventStream:
    """A stream of server-sent events. Its jobs end with it, also where the client goes before the first event."""

    def __init__(self, answers: Answers, mailbox: Mailbox, jobs: Sequence[Job], *, with_usage: bool) -> None:
        chunks = _chunks(answers, mailbox, with_usage=with_usage)
        self._response = StreamingResponse(
            chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._jobs = jobs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            cancel(self._jobs)


async def _chunks(answers: Answers, mailbox: Mailbox, *, with_usage: bool) -> AsyncIterator[str]:
    try:
        while not answers.done:
            chunk = answers.take(*await mailbox.get())
            if chunk is not None:
                yield _event(chunk)
        if with_usage:
            yield _event(answers.usage_chunk())
    except ApiError as error:
        yield _event(error.body())
    yield "data: [DONE]\n\n"


async def whole(answers: Answers, mailbox: Mailbox) -> None:
    while not answers.done:
        answers.take(*await mailbox.get())


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def cancel(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.cancelled = True
