"""A small client of an OpenAI-compatible server, for the judges whose model stands behind one."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from alignx_ds.config.schema import JudgesConfig
from alignx_ds.errors import ConfigError, DataError, Problem, redact

if TYPE_CHECKING:
    from openai import OpenAI, OpenAIError

KEY = "OPENAI_API_KEY"
NO_KEY = "no-key"  # the client insists on one; a local server looks at none
MAX_TOKENS = 8  # a judge answers with a word

Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and the log-probabilities of the likeliest first tokens where the server gives them."""

    text: str
    logprobs: dict[str, float] | None = None


@dataclass(frozen=True)
class Endpoint:
    """Greedy one-word replies of `model`. The key comes from the environment when asked, and is never kept."""

    base_url: str
    model: str
    parallel: int = 8  # requests under way at a time
    timeout: float = 60.0  # seconds, of one attempt
    retries: int = 4  # of a request that meets a timeout, a lost connection, 408, 409, 429 or 5xx

    def ask(self, conversations: Iterable[list[Message]], top_logprobs: int = 0) -> Iterator[Reply]:
        """One reply per conversation, in order, as soon as it is there.

        Raises DataError at the first request that fails for good. Who stops early cancels what has not been sent yet.
        """
        import openai  # only who asks an endpoint needs it

        key = _key()
        with (
            openai.OpenAI(
                base_url=self.base_url, api_key=key or NO_KEY, timeout=self.timeout, max_retries=self.retries
            ) as client,
            ThreadPoolExecutor(self.parallel) as pool,
        ):

            def reply(conversation: list[Message]) -> Reply:
                try:
                    return self._complete(client, conversation, top_logprobs)
                except openai.OpenAIError as error:
                    complaint = self._complaint(error)
                    # without its cause: a server may have echoed the key into it
                    raise DataError(complaint.replace(key, "***") if key else complaint) from None

            # a window wider than the pool: a slow reply at its head leaves no worker idle
            yield from _in_order(pool, reply, conversations, window=2 * self.parallel)

    def _complete(self, client: OpenAI, conversation: list[Message], top_logprobs: int) -> Reply:
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
        try:  # the client does not check what it was sent, and servers leave parts out
            completion: Any = client.chat.completions.create(
                model=self.model, messages=cast(Any, conversation), temperature=0, max_tokens=MAX_TOKENS, **options
            )
            choice = completion.choices[0]
            text = redact(choice.message.content or "")  # it is kept; a server may echo the key
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, IndexError) as error:
            fix = "give the address that its /chat/completions lies under as judges.endpoint"
            raise DataError(f"{self.base_url}: the reply is no chat completion; {fix}") from error
        tokens = choice.logprobs.content if top_logprobs and choice.logprobs else None
        likeliest = tokens[0].top_logprobs if tokens else None
        return Reply(text, {t.token: t.logprob for t in likeliest} if likeliest else None)

    def _complaint(self, error: OpenAIError) -> str:
        """One line: who said what, and what to do. What a server says about a key stays unsaid."""
        import openai

        match error:
            case openai.APITimeoutError():
                what = (
                    f"no reply within {self.timeout:g} seconds; lower judges.endpoint_parallel or use a faster server"
                )
            case openai.APIConnectionError():
                what = "can't be reached; start the server or correct judges.endpoint"
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                what = f"refuses the key; export {KEY} with one that may use {self.model}"
            case openai.NotFoundError():
                what = f"has no model '{self.model}' there; correct judges.endpoint_model or judges.endpoint"
            case openai.RateLimitError():
                what = f"too many requests, after {self.retries} retries; lower judges.endpoint_parallel or await quota"
            case openai.APIStatusError():
                said = " ".join(error.message.split())[:300]
                what = f"status {error.status_code} ({said}); look at the server's log, or try another endpoint_model"
            case _:
                what = f"{type(error).__name__}; check that judges.endpoint is an OpenAI-compatible server"
        return f"{self.base_url}: {what}"


def _key() -> str:
    """The key, "" for none. Raises ConfigError on one that fits in no header: the HTTP library would print it."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(Problem(KEY, "(not shown)", "printable ASCII", "export it again"))
    return key


def _in_order(
    pool: ThreadPoolExecutor,
    reply: Callable[[list[Message]], Reply],
    conversations: Iterable[list[Message]],
    window: int,
) -> Iterator[Reply]:
    waiting: deque[Future[Reply]] = deque()
    try:
        for conversation in conversations:
            waiting.append(pool.submit(reply, conversation))
            if len(waiting) == window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def problems(settings: JudgesConfig) -> list[Problem]:
    """What keeps the config from naming an endpoint."""
    found = []
    try:
        url = urlsplit(settings.endpoint)
    except ValueError:  # brackets that hold no address
        url = urlsplit("")
    if "@" in settings.endpoint:
        found.append(Problem("judges.endpoint", "(not shown)", "no user and password", f"export the key as {KEY}"))
    elif url.scheme not in ("http", "https") or not url.netloc:
        fix = "set it, for a local server as http://localhost:8000/v1"
        found.append(Problem("judges.endpoint", settings.endpoint, "an OpenAI-compatible server's address", fix))
    if not settings.endpoint_model:
        fix = "set it to a model that the endpoint serves"
        found.append(Problem("judges.endpoint_model", settings.endpoint_model, "a model's name", fix))
    return found


def connect(settings: JudgesConfig) -> Endpoint:
    """The config's endpoint; nothing is sent yet. Raises ConfigError with every problem, ModuleNotFoundError."""
    import openai  # noqa: F401 (to fail here, and not after hours of answers)

    if found := problems(settings):
        raise ConfigError(*found)
    return Endpoint(settings.endpoint, settings.endpoint_model, settings.endpoint_parallel)
