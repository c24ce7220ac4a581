"""OpenAI's endpoints of a model in this process. Nothing here computes with the model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from alignx_ds.errors import DataError
from alignx_ds.serve.answers import Answers, ChatForm, CompletionForm, Form, TokenNames
from alignx_ds.serve.delivery import EventStream, Mailbox, cancel, whole
from alignx_ds.serve.http import HttpApi
from alignx_ds.serve.jobs import Job
from alignx_ds.serve.metrics import Metrics
from alignx_ds.serve.page import page
from alignx_ds.serve.prompts import PromptEncoder
from alignx_ds.serve.protocol import ApiError, ChatRequest, CompletionRequest, parsed
from alignx_ds.serve.requests import while_connected
from alignx_ds.serve.scheduler import QueueFullError, Scheduler


@dataclass(frozen=True)
class Limits:
    """What a request may take."""

    slots: int  # answers that are decoded together
    context: int  # tokens of a prompt and its answer
    queue: int  # prompts that wait
    body: int  # bytes


class Api(HttpApi):
    """The endpoints of a model in this process."""

    def __init__(
        self,
        scheduler: Scheduler,
        encoder: PromptEncoder,
        names: TokenNames,
        metrics: Metrics,
        *,
        name: str,
        experts: list[str],
        limits: Limits,
        key: str | None,
        local: bool,
    ) -> None:
        """`local`: only this machine can reach the server."""
        super().__init__(metrics, name=name, experts=experts, body=limits.body, key=key, local=local)
        self.scheduler, self.limits = scheduler, limits
        self._encoder, self._names = encoder, names
        self._encoding = ThreadPoolExecutor(1, "encoding")  # one: a tokenizer is not safe to share between threads
        self._page = page()

    def app(self) -> Any:
        """The ASGI application."""
        return self.asgi(
            Route("/", self.page, methods=["GET"]),
            Route("/v1/chat/completions", self.answering(self.chat), methods=["POST"]),
            Route("/v1/completions", self.answering(self.completions), methods=["POST"]),
            Route("/v1/models", self.checked(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", self.checked(self.model), methods=["GET"]),
        )

    @property
    def alive(self) -> bool:
        return self.scheduler.alive

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    async def page(self, request: Request) -> Response:
        """For people; it asks for the key itself."""
        return self._page

    async def model(self, request: Request) -> Response:
        self.check_name(request.path_params["name"])
        return JSONResponse(self.card())

    async def chat(self, request: Request, body: bytes) -> Response:
        wanted = parsed(ChatRequest, body)
        self.check_name(wanted.model)
        ids = await self._encoded(self._encoder.chat, wanted.chat())
        return await self._answer(request, wanted, [ids], ChatForm(), strip=True)

    async def completions(self, request: Request, body: bytes) -> Response:
        wanted = parsed(CompletionRequest, body)
        self.check_name(wanted.model)
        prompts = [await self._encoded(self._encoder.text, prompt) for prompt in wanted.prompts()]
        return await self._answer(request, wanted, prompts, CompletionForm(), strip=False)

    async def _encoded(self, encode: Callable[[Any], list[int]], prompt: Any) -> list[int]:
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._encoding, encode, prompt)
        except DataError as error:
            raise ApiError(400, str(error)) from error
        if not ids:
            raise ApiError(400, "the prompt is empty; give it at least one token", param="prompt")
        return ids

    def _max_tokens(self, prompt: int, limit: int | None) -> int:
        room = self.limits.context - prompt
        if room < 1 or (limit or 1) > room:
            asked = f"the prompt has {prompt} tokens" + (f" and the answer may have {limit}" if limit else "")
            message = f"{asked}, but both together may have {self.limits.context}; shorten the prompt or the answer"
            raise ApiError(400, message, code="context_length_exceeded")
        return limit or room

    async def _answer(
        self,
        request: Request,
        wanted: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        form: Form,
        strip: bool,
    ) -> Response:
        if wanted.answers > self.limits.slots:
            raise ApiError(400, f"n: got {wanted.answers}; this server decodes {self.limits.slots} at once", param="n")
        if len(prompts) > self.limits.queue:
            message = f"the request has {len(prompts)} prompts; this server's queue takes {self.limits.queue}"
            raise ApiError(400, f"{message}: send fewer at once", param="prompt")
        mailbox = Mailbox()
        jobs = [
            Job(
                ids,
                mailbox.sender(number),
                wanted.sampling,
                max_tokens=self._max_tokens(len(ids), wanted.limit),
                n=wanted.answers,
                stop=tuple(wanted.stop or ()),
                needs=wanted.needs(self.experts),
                strip=strip,
                stream=bool(wanted.stream),
            )
            for number, ids in enumerate(prompts)
        ]
        answers, asked = Answers(form, jobs, self.name, self._names), time.perf_counter()
        try:
            self.scheduler.submit(jobs)
        except QueueFullError as error:
            message = f"{self.limits.queue} prompts wait already; try again later"
            raise ApiError(429, message, code="queue_full", retry=True) from error
        try:
            first = await while_connected(request, mailbox.get())  # an error before it is not in a stream yet
            self.metrics.first_token.observe(time.perf_counter() - asked)
            answers.take(*first)
            if wanted.stream:
                return EventStream(answers, mailbox, jobs, with_usage=wanted.with_usage)
            await while_connected(request, whole(answers, mailbox))
            return JSONResponse(answers.body())
        except BaseException:
            cancel(jobs)
            raise
