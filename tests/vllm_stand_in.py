"""A server that speaks vLLM's API as far as a router needs it: model cards, chat, completions, streams and errors."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

BASE = "meta-llama/base"
PIECES = ("an ", "answer ", "from ")


@dataclass
class StandIn:
    """`bodies` are those of all requests, in their order; an answer is PIECES and the name of its model."""

    models: list[str]
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    left: int = 0  # streams that their client has left
    reply: bytes = b""  # instead of an answer
    most: int = 1000  # chats that it answers; the others it is too busy for

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completion, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        cards = [{"id": m, "object": "model", "parent": None if m == BASE else BASE} for m in (BASE, *self.models)]
        return JSONResponse({"object": "list", "data": cards})

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request)
        if len(self.bodies) > self.most:
            return Response(status_code=503, headers={"retry-after-ms": "10"})
        if body["max_tokens"] > 100:
            error = {"message": "max_tokens is too large", "type": "BadRequestError", "param": None, "code": 400}
            return JSONResponse({"error": error}, 400)
        if self.reply:
            stream = bool(body.get("stream"))
            event = b"data: {" + self.reply + b"\n\n" if stream else self.reply
            return Response(event, media_type="text/event-stream" if stream else "application/json")
        if body.get("stream"):
            return StreamingResponse(self._stream(body), media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", "content": self._text(body)}, "finish_reason": "stop"}
        return JSONResponse({**_head("chat.completion", body), "choices": [choice]})

    async def _completion(self, request: Request) -> Response:
        body = await self._read(request)
        choice = {"index": 0, "text": self._text(body), "finish_reason": "stop", "logprobs": None}
        return JSONResponse({**_head("text_completion", body), "choices": [choice]})

    async def _read(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization", ""))
        return body

    def _text(self, body: dict[str, Any]) -> str:
        return "".join(PIECES) + str(body["model"])

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            for piece in (*PIECES, str(body["model"])):
                choice = {"index": 0, "delta": {"role": "assistant", "content": piece}, "finish_reason": None}
                yield f"data: {json.dumps({**_head('chat.completion.chunk', body), 'choices': [choice]})}\n\n"
                await asyncio.sleep(0.2 if body.get("seed") == 1 else 0)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise


def _head(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"id": "cmpl-1", "object": kind, "created": int(time.time()), "model": body["model"]}


@contextmanager
def running(app: Any) -> Iterator[int]:
    """The application behind a free port of this machine, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)


@contextmanager
def stand_in(*models: str) -> Iterator[StandIn]:
    made = StandIn(list(models))
    with running(made.app()) as made.port:
        yield made
