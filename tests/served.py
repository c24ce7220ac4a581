"""A server in this process: uvicorn in a thread, on a free port of this machine."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from torch import Tensor

from alignx_ds.serve.app import Api
from alignx_ds.serve.model import load_any
from alignx_ds.serve.server import Settings, api_of, server_of

KEY = "a key of the tests"


@dataclass
class Served:
    api: Api
    port: int
    steps: threading.Event  # while it is not set, no decoding step is made
    blocked: threading.Event  # whether the scheduler's thread waits for that: it reads no prompts either

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it nothing that runs goes on."""
        self.steps.clear()
        try:
            yield
        finally:
            self.steps.set()

    def wait(self, *, running: int, waiting: int = 0) -> None:
        """Until so many answers run and prompts wait; within `held`, until that can't change by itself."""
        scheduler, end = self.api.scheduler, time.monotonic() + 30
        while (len(scheduler._running), len(scheduler._waiting)) != (running, waiting) or not (
            self.steps.is_set() or self.blocked.is_set()
        ):
            assert time.monotonic() < end, f"{len(scheduler._running)} run, {len(scheduler._waiting)} wait"
            time.sleep(0.01)


@contextmanager
def serving(directory: Path, key: str | None = KEY, name: str = "tiny", **settings: int) -> Iterator[Served]:
    model, tokenizer = load_any(str(directory))
    api = api_of(model, tokenizer, Settings(str(directory), name=name, **settings), key)
    steps, blocked, step = threading.Event(), threading.Event(), api.scheduler._slots.step
    steps.set()

    def held_step(tokens: list[int]) -> Tensor:
        if not steps.is_set():
            blocked.set()
            assert steps.wait(60)
            blocked.clear()
        return step(tokens)

    api.scheduler._slots.step = held_step  # type: ignore[method-assign]
    server = server_of(api)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Served(api, port, steps, blocked)
        steps.set()
        server.should_exit = True
        thread.join(30)
        api.scheduler.close()
    assert not thread.is_alive()
