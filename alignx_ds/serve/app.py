"""The server's routes: OpenAI's endpoints, health and metrics. Nothing here computes with the model."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from alignx_ds.errors import DataError
from alignx_ds.runtime import console
from alignx_ds.serve.answers import Answers, ChatForm, CompletionForm, Form, TokenNames
from alignx_ds.serve.delivery import EventStream, Mailbox, cancel, whole
from alignx_ds.serve.jobs import Job
from alignx_ds.serve.metrics import Metrics
from alignx_ds.serve.page import page
from alignx_ds.serve.prompts import PromptEncoder
from alignx_ds.serve.protocol import ApiError, ChatRequest, CompletionRequest, parsed
from alignx_ds.serve.requests import check_host, check_key, read_body, while_connected
from alignx_ds.serve.scheduler import QueueFullError, Scheduler

RETRY_SECONDS = "5"
NOBODY = 499  # nginx's, for a client that has left: it is counted, and nobody reads it
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """What a request may take."""

    slots: int  # answers that are decoded together
    context: int  # tokens of a prompt and its answer
    queue: int  # prompts that wait
    body: int  # bytes


class Api:
    """The routes and what they share."""

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
        self.scheduler, self.metrics, self.limits = scheduler, metrics, limits
        self.draining = False  # set when the server is to stop: no new work
        self._encoder, self._names, self._name, self._experts, self._key = encoder, names, name, experts, key
        self._own_host = local and key is None  # whether requests have to be addressed to this machine
        self._encoding = ThreadPoolExecutor(1, "encoding")  # one: a tokenizer is not safe to share between threads
        self._started, self._page = int(time.time()), page()

    def app(self) -> Any:
        """The ASGI application."""
        routes = [
            Route("/", self.page, methods=["GET"]),
            Route("/v1/chat/completions", self._answering(self.chat), methods=["POST"]),
            Route("/v1/completions", self._answering(self.completions), methods=["POST"]),
            Route("/v1/models", self._checked(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._checked(self.model), methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.prometheus, methods=["GET"]),
        ]
        inner = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
        paths = {route.path for route in routes}

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            status, started = 0, time.perf_counter()

            async def sending(message: Any) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            try:
                await inner(scope, receive, sending)
            finally:
                path = scope["path"] if scope["path"] in paths else "other"
                self.metrics.request(path, status, time.perf_counter() - started)

        return counted

    async def page(self, request: Request) -> Response:
        """For people; it asks for the key itself."""
        return self._page

    async def health(self, request: Request) -> Response:
        """200 while requests are accepted, 503 otherwise."""
        state = "draining" if self.draining else "ok" if self.scheduler.alive else "failed"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self._name, "object": "model", "created": self._started, "owned_by": "alignx-ds"}
        return {**card, "alignx": {"axes": self._experts[1:]} if self._experts else None}

    async def chat(self, request: Request, body: bytes) -> Response:
        wanted = parsed(ChatRequest, body)
        self._check_name(wanted.model)
        ids = await self._encoded(self._encoder.chat, wanted.chat())
        return await self._answer(request, wanted, [ids], ChatForm(), strip=True)

    async def completions(self, request: Request, body: bytes) -> Response:
        wanted = parsed(CompletionRequest, body)
        self._check_name(wanted.model)
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

    def _check_name(self, name: str) -> None:
        if name != self._name:
            message = f"there is no model {name!r} here; this server has {self._name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

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
                needs=wanted.needs(self._experts),
                strip=strip,
                stream=bool(wanted.stream),
            )
            for number, ids in enumerate(prompts)
        ]
        answers, asked = Answers(form, jobs, self._name, self._names), time.perf_counter()
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

    def _answering(self, handler: Callable[[Request, bytes], Awaitable[Response]]) -> Handler:
        async def answer(request: Request) -> Response:
            if self.draining:
                raise ApiError(503, "the server is shutting down; ask another one, or try again later", retry=True)
            return await handler(request, await read_body(request, self.limits.body))

        return self._checked(answer)

    def _checked(self, handler: Handler) -> Handler:
        """The handler behind the key; what it raises becomes an answer in OpenAI's format."""

        async def checked(request: Request) -> Response:
            try:
                if self._own_host:
                    check_host(request)
                check_key(request, self._key)
                return await handler(request)
            except ApiError as error:
                return _refused(error)
            except ClientDisconnect:
                return Response(status_code=NOBODY)
            except Exception as error:  # noqa: BLE001 - a client never sees a traceback, the console does
                console.warn(f"a request failed:\n{''.join(traceback.format_exception(error))}")
                return _refused(ApiError(500, "the server failed to answer; its console says why"))

        return checked


def _refused(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers={"Retry-After": RETRY_SECONDS} if error.retry else None)


async def _no_route(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}"
    known = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health, GET /metrics"
    return _refused(ApiError(error.status_code, f"{what}: there is no such endpoint; there are {known}"))
