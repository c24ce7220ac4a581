"""`alignx-ds serve MODEL`: an aligned model, or a dense one, behind OpenAI's HTTP interface.

On SIGTERM or Ctrl-C it accepts no more requests, finishes those that it has, and exits with code 0. A second signal
ends it at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from uvicorn.protocols.http.h11_impl import H11Protocol

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.models.ends import vocabulary_of
from alignx_ds.runtime import console
from alignx_ds.runtime.exit import exit_now
from alignx_ds.runtime.signals import Requests
from alignx_ds.serve.answers import TokenNames
from alignx_ds.serve.app import Api, Limits
from alignx_ds.serve.metrics import Metrics
from alignx_ds.serve.model import load_any, load_router, model_directory
from alignx_ds.serve.prompts import PromptEncoder
from alignx_ds.serve.proxy import Gate, Proxy
from alignx_ds.serve.requests import LOOPBACK
from alignx_ds.serve.scheduler import Scheduler
from alignx_ds.serve.upstream import Upstream

KEY_VARIABLE = "ALIGNX_API_KEY"
MOST_CONTEXT = 4096  # tokens, unless --context says more: every slot holds so many
HEADER_SECONDS = 30.0  # within which a connection has to send its first request's headers
SENDING_SECONDS = 30  # that a client has to read the rest of its answer when the server ends
MOST_CONNECTIONS = 1000


@dataclass(frozen=True)
class Settings:
    """The command's options."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    api_key_file: str = ""
    slots: int = 16
    context: int = 0
    queue: int = 64
    max_body: int = 1_000_000
    router_for: str = ""


class Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn's server, which leaves the signals to `serve`."""

    def capture_signals(self) -> Any:
        return nullcontext()


class Protocol(H11Protocol):  # type: ignore[misc]
    """HTTP/1.1 that does not wait for a request's headers for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._expect_headers)

    def _expect_headers(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
                b"no request was complete in time; send its headers at once\n"
            )
            self.transport.close()


def serve(settings: Settings) -> int:
    """Serve until a signal. Returns the exit code. Raises ConfigError before the model is loaded, or DataError."""
    _check(settings)
    key = _key(settings)
    listening = _bound(settings.host, settings.port)
    if key is None and settings.host not in LOOPBACK:
        console.warn(
            f"everybody who reaches {settings.host} may use the model; set {KEY_VARIABLE} to a key of your own"
        )
    with listening:
        if settings.router_for:
            asyncio.run(_until_signal(proxy_of(settings, key), listening, f"routes for {settings.router_for}"))
        else:
            answer(api_of(*load_any(settings.model), settings, key), listening)
    return 0


def answer(api: Api, listening: socket.socket) -> None:
    """Serve a model of this process until a signal."""
    with closing(api.scheduler):
        asyncio.run(_until_signal(api, listening, f"{api.limits.slots} slots of {api.limits.context} tokens"))


def _check(settings: Settings) -> None:
    """Raises ConfigError for numbers that make no sense."""
    least_one = {"--slots": settings.slots, "--queue": settings.queue, "--max-body": settings.max_body}
    problems = [Problem(name, value, "at least 1", "raise it") for name, value in least_one.items() if value < 1]
    if not 0 <= settings.port < 2**16:
        problems.append(Problem("--port", settings.port, "0 to 65535", "0 takes any that is free"))
    if problems:
        raise ConfigError(*problems)


def api_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, key: str | None) -> Api:
    """Starts the thread that decodes. Raises ConfigError for a context that the model does not have."""
    experts = list(getattr(model.config, "experts", []))
    metrics, context = Metrics(experts), _context(model, settings.context)
    scheduler = Scheduler(model, tokenizer, metrics, slots=settings.slots, context=context, queue=settings.queue)
    return Api(
        scheduler,
        PromptEncoder(tokenizer, vocabulary_of(model.config)),
        TokenNames(tokenizer),
        metrics,
        name=name_of(settings),
        experts=experts,
        limits=Limits(settings.slots, context, settings.queue, settings.max_body),
        key=key,
        local=settings.host in LOOPBACK,
    )


def proxy_of(settings: Settings, key: str | None) -> Proxy:
    """Asks the server behind it for its models. Raises ConfigError where it lacks one, DataError for a dense model."""
    model, tokenizer = load_router(settings.model)
    gate = Gate(model, tokenizer, _context(model, settings.context))
    return Proxy(
        gate,
        Upstream(settings.router_for, gate.experts),
        Metrics(gate.experts),
        name=name_of(settings),
        queue=settings.queue,
        body=settings.max_body,
        key=key,
        local=settings.host in LOOPBACK,
    )


def server_of(api: Api | Proxy) -> Server:
    """Its log has failures of the server alone: neither prompts nor keys, and no line for every broken request."""
    config = uvicorn.Config(
        api.app(),
        http=Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_level="error",
        access_log=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=SENDING_SECONDS,
    )
    return Server(config)


async def _until_signal(api: Api | Proxy, listening: socket.socket, what: str) -> None:
    server = server_of(api)
    loop, running = asyncio.get_running_loop(), asyncio.ensure_future(server.serve([listening]))

    async def drain() -> None:
        while not api.idle:
            await asyncio.sleep(0.05)
        server.should_exit = True  # uvicorn waits until the last answers are sent

    received, tasks = Requests(), []

    def stop(number: int) -> None:
        if received.is_another(number):
            exit_now(128 + number)
        if not api.draining:
            api.draining = True
            console.note("no more requests are accepted; those that run are finished; a second signal ends it at once")
            tasks.append(loop.create_task(drain()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    host, port = listening.getsockname()[:2]
    at = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    console.note(f"serving {api.name} at {at}/v1: {what}")
    await running


def name_of(settings: Settings) -> str:
    """By which clients ask for the model: its directory's name, or its run's."""
    directory = model_directory(settings.model).resolve()
    return settings.name or (directory.parent if directory.name == "model" else directory).name


def _key(settings: Settings) -> str | None:
    """From the file, or the environment. None: no key is asked for."""
    if not settings.api_key_file:
        return os.environ.get(KEY_VARIABLE, "").strip() or None
    file = Path(settings.api_key_file)
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            Problem("--api-key-file", str(file), "a file with the key", f"it can't be read ({error})")
        ) from error
    if not key:
        raise ConfigError(
            Problem("--api-key-file", str(file), "a file with the key", "it is empty; write a key into it")
        )
    return key


def _bound(host: str, port: int) -> socket.socket:
    """Before the model is loaded, which takes longer. Nobody can connect until the server listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        fix = f"it can't be bound ({error}); choose another --host or --port"
        raise ConfigError(Problem("--host, --port", f"{host}:{port}", "an address of this machine", fix)) from error
    return made


def _context(model: PreTrainedModel, wanted: int) -> int:
    most = int(getattr(model.config.get_text_config(), "max_position_embeddings", MOST_CONTEXT))
    if wanted < 0 or wanted == 1 or wanted > most:
        raise ConfigError(Problem("--context", wanted, f"2 to {most}, which the model knows", "change it"))
    return wanted or min(most, MOST_CONTEXT)
