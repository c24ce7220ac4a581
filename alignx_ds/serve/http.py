"""What every server does with a request: its key and host, its errors, its count, health and metrics."""

from __future__ import annotations

import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from alignx_ds.runtime import console
from alignx_ds.serve.metrics import Metrics
from alignx_ds.serve.protocol import ApiError
from alignx_ds.serve.requests import check_host, check_key, read_body

RETRY_SECONDS = "5"
NOBODY = 499  # nginx's, for a client that has left: it is counted, and nobody reads it
Handler = Callable[[Request], Awaitable[Response]]


class HttpApi:
    """The base of the servers."""

    def __init__(
        self, metrics: Metrics, *, name: str, experts: list[str], body: int, key: str | None, local: bool
    ) -> None:
        """`name`: of the model, whose experts are these; `body`: bytes that one may have; `local`: only this machine
        can reach the server.
        """
        self.metrics, self.name, self.experts = metrics, name, experts
        self._started = int(time.time())
        self.draining = False  # set when the server is to stop: no new work
        self.running = 0  # requests that are not answered yet, to the end of their streams
        self._body, self._key = body, key
        self._own_host = local and key is None  # whether requests have to be addressed to this machine

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        return True

    @property
    def idle(self) -> bool:
        return self.running == 0

    def asgi(self, *routes: Route) -> Any:
        """The ASGI application of these routes, of health and of metrics, whose requests are counted."""
        own = Route("/health", self.health, methods=["GET"]), Route("/metrics", self.prometheus, methods=["GET"])
        inner = Starlette(routes=[*routes, *own], exception_handlers={HTTPException: _no_route})
        paths = {route.path for route in (*routes, *own)}

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            status, started = 0, time.perf_counter()

            async def sending(message: Any) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            self.running += 1
            try:
                await inner(scope, receive, sending)
            finally:
                self.running -= 1
                path = scope["path"] if scope["path"] in paths else "other"
                self.metrics.request(path, status, time.perf_counter() - started)

        return counted

    async def health(self, request: Request) -> Response:
        """200 while requests are accepted, 503 otherwise."""
        state = "draining" if self.draining else "ok" if self.alive else "failed"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.card()]})

    def card(self) -> dict[str, Any]:
        """The model in OpenAI's format, with its axes."""
        card = {"id": self.name, "object": "model", "created": self._started, "owned_by": "alignx-ds"}
        return {**card, "alignx": {"axes": self.experts[1:]} if self.experts else None}

    def check_name(self, name: str) -> None:
        """Raises ApiError unless it is that of the model."""
        if name != self.name:
            message = f"there is no model {name!r} here; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def answering(self, handler: Callable[[Request, bytes], Awaitable[Response]]) -> Handler:
        """The handler of a request with a body, as long as the server is not to stop."""

        async def answer(request: Request) -> Response:
            if self.draining:
                raise ApiError(503, "the server is shutting down; ask another one, or try again later", retry=True)
            return await handler(request, await read_body(request, self._body))

        return self.checked(answer)

    def checked(self, handler: Handler) -> Handler:
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
