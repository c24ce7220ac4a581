"""`alignx-ds serve MODEL --router-for URL`: the gate decides for every prompt, and another server answers.

Of the aligned model only the layers up to the lowest AlignX layer are loaded. A request is passed on as it is, but for
its model, which becomes that of the experts that its prompt needs.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import httpx2
import torch
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from alignx_ds.errors import DataError
from alignx_ds.mocae.serving import gates_of_needs
from alignx_ds.models.backbone import LowerLayers
from alignx_ds.models.ends import vocabulary_of
from alignx_ds.serve.http import HttpApi
from alignx_ds.serve.jobs import Report
from alignx_ds.serve.metrics import Metrics
from alignx_ds.serve.prompts import PromptEncoder
from alignx_ds.serve.protocol import ApiError, RoutedRequest, chat_of, needs_of, read_object, validated
from alignx_ds.serve.report import report_of
from alignx_ds.serve.requests import while_connected
from alignx_ds.serve.upstream import UNREADABLE, Upstream

DATA = "data: "  # begins an event of a stream


class Gate:
    """Decides for one prompt at a time, in one thread: neither the tokenizer nor the model may be shared."""

    def __init__(self, model: LowerLayers, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        """`context`: tokens that a prompt may have."""
        self.model, self.experts, self.context = model, list(model.config.experts), context
        self.encoder = PromptEncoder(tokenizer, vocabulary_of(model.config))

    @torch.inference_mode()
    def decide(self, encode: Callable[[Any], list[int]], prompt: Any, needs: list[float] | None) -> tuple[int, Report]:
        """(the prompt's tokens, how it is routed), with the axes' `needs` as given. Raises DataError for a prompt."""
        ids = encode(prompt)
        if not ids:
            raise DataError("the prompt is empty; give it at least one token")
        if len(ids) > self.context:
            raise DataError(f"the prompt has {len(ids)} tokens, of which {self.context} are read; shorten it")
        forced = None if needs is None else gates_of_needs(torch.tensor([needs], device=self.model.device))
        given = torch.tensor([ids], device=self.model.device)
        self.model(given, forced=forced, use_cache=False, logits_to_keep=1)
        report = report_of(self.model, self.model.routing, self.experts)
        assert report is not None
        return len(ids), report


class Proxy(HttpApi):
    """The routes of a router."""

    def __init__(
        self,
        gate: Gate,
        upstream: Upstream,
        metrics: Metrics,
        *,
        name: str,
        queue: int,
        body: int,
        key: str | None,
        local: bool,
    ) -> None:
        """`queue`: prompts that may wait for the gate; the rest as in HttpApi."""
        super().__init__(metrics, name=name, experts=gate.experts, body=body, key=key, local=local)
        self._gate, self._upstream, self._queue = gate, upstream, queue
        self._deciding, self._waiting = ThreadPoolExecutor(1, "gate"), 0

    def app(self) -> Any:
        """The ASGI application."""
        return self.asgi(
            Route("/v1/chat/completions", self.answering(self.chat), methods=["POST"]),
            Route("/v1/completions", self.answering(self.completions), methods=["POST"]),
            Route("/v1/models", self.checked(self.models), methods=["GET"]),
        )

    async def chat(self, request: Request, body: bytes) -> Response:
        given = read_object(body)
        wanted = validated(RoutedRequest, given)
        if wanted.messages is None:
            raise ApiError(400, "messages is missing; add it", param="messages")
        turns = chat_of(wanted.messages)
        return await self._answer(request, "chat/completions", given, wanted, self._gate.encoder.chat, turns)

    async def completions(self, request: Request, body: bytes) -> Response:
        given = read_object(body)
        wanted = validated(RoutedRequest, given)
        return await self._answer(request, "completions", given, wanted, self._gate.encoder.text, wanted.one_prompt())

    async def _answer(
        self,
        request: Request,
        path: str,
        given: dict[str, Any],
        wanted: RoutedRequest,
        encode: Callable[[Any], list[int]],
        prompt: Any,
    ) -> Response:
        self.check_name(wanted.model)
        needs = None if wanted.axes is None else needs_of(wanted.axes, self._gate.experts)
        report = await while_connected(request, self._decided(encode, prompt, needs))
        model = self._upstream.model_for(report.gates)
        self.metrics.passed_on(model)
        passed = {name: value for name, value in given.items() if name != "axes"} | {"model": model}
        answer = await while_connected(request, self._upstream.send(path, passed))
        facts = asdict(report) | {"served_by": model}
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            return StreamingResponse(self._events(answer, facts), answer.status_code, media_type="text/event-stream")
        try:
            content = await while_connected(request, answer.aread())
        except httpx2.TransportError as error:
            raise _broken(error) from error
        finally:
            await answer.aclose()
        if answer.status_code != 200:
            return Response(content, answer.status_code, media_type=answer.headers.get("content-type"))
        return Response(self._named(content, facts), media_type="application/json")

    async def _decided(self, encode: Callable[[Any], list[int]], prompt: Any, needs: list[float] | None) -> Report:
        if self._waiting >= self._queue:
            message = f"{self._queue} prompts wait for the gate already; try again later"
            raise ApiError(429, message, code="queue_full", retry=True)
        self._waiting += 1
        started = time.perf_counter()
        try:
            loop = asyncio.get_running_loop()
            tokens, report = await loop.run_in_executor(self._deciding, self._gate.decide, encode, prompt, needs)
        except DataError as error:
            raise ApiError(400, str(error)) from error
        finally:
            self._waiting -= 1
        self.metrics.prompt(tokens, report)
        self.metrics.routing.observe(time.perf_counter() - started)
        return report

    async def _events(self, answer: httpx2.Response, facts: dict[str, Any]) -> AsyncIterator[str]:
        """The server's events, with this server's name of the model, and how the prompt was routed in the first."""
        first: dict[str, Any] | None = facts
        try:
            async for line in answer.aiter_lines():
                if line.startswith(f"{DATA}{{"):
                    yield f"{DATA}{self._named(line.removeprefix(DATA), first)}\n"
                    first = None
                else:
                    yield f"{line}\n"
        except httpx2.TransportError as error:
            yield f"{DATA}{json.dumps(_broken(error).body())}\n\n"
        except ApiError as error:
            yield f"{DATA}{json.dumps(error.body())}\n\n"
        finally:
            await answer.aclose()

    def _named(self, text: str | bytes, facts: dict[str, Any] | None) -> str:
        """A JSON object of the server, with this server's name of the model, and `facts` as its field alignx.

        Raises ApiError where it is none.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise _broken(error) from error
        if not isinstance(content, dict):
            raise _broken(TypeError(f"a JSON {type(content).__name__}"))
        if "error" not in content:
            content |= {"model": self.name} | ({} if facts is None else {"alignx": facts})
        return json.dumps(content, ensure_ascii=False)


def _broken(error: Exception) -> ApiError:
    return ApiError(UNREADABLE, f"the server behind this router broke off its answer ({error})", retry=True)
