"""A small client for OpenAI-compatible servers, which run a judge's model, or a model whose answers are judged."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import httpx2

from alignx_ds.config.evaluation import JudgesConfig
from alignx_ds.errors import ConfigError, DataError, Problem, redact

if TYPE_CHECKING:
    from openai import OpenAI, OpenAIError

KEY = "OPENAI_API_KEY"
NO_KEY = "no-key"  # the client requires a key, local servers usually do not
MAX_TOKENS = 8  # a judge replies with one word
ADDRESS = "an OpenAI-compatible server's address"
LISTING_SECONDS = 10.0

Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class Reply:
    """The model's text, and the log-probabilities of the likeliest first tokens if the server returns them."""

    text: str
    logprobs: dict[str, float] | None = None


@dataclass(frozen=True)
class Names:
    """What the user sets the address, the model and the number of requests at a time by."""

    address: str = "judges.endpoint"
    model: str = "judges.endpoint_model"
    parallel: str = "judges.endpoint_parallel"


ANSWERS = Names("evaluation.endpoint", "the names of the server's models", "evaluation.batch")


@dataclass(frozen=True)
class Endpoint:
    """Greedy replies of `model`. The key is read from the environment for each call and never stored."""

    base_url: str
    model: str
    parallel: int = 8  # requests at a time
    timeout: float = 60.0  # seconds per attempt
    retries: int = 4  # after a timeout, a lost connection, or status 408, 409, 429 or 5xx
    max_tokens: int = MAX_TOKENS  # of a reply
    names: Names = Names()

    def ask(self, conversations: Iterable[list[Message]], top_logprobs: int = 0) -> Iterator[Reply]:
        """One reply per conversation, in order, each as soon as it arrives.

        Raises DataError for the first request that fails after its retries. Closing the iterator cancels the requests
        that are not sent yet.
        """
        import openai  # a heavy package that other judges do not need

        key = key_from()
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
                    message = self._message(error)
                    # without the cause: a server may have echoed the key into it
                    raise DataError(message.replace(key, "***") if key else message) from None

            # twice as many submitted as workers: while the first reply is slow, the others keep all workers busy
            yield from _in_order(pool, reply, conversations, window=2 * self.parallel)

    def _complete(self, client: OpenAI, conversation: list[Message], top_logprobs: int) -> Reply:
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
        try:  # the client does not validate replies, and servers leave parts out
            completion: Any = client.chat.completions.create(
                model=self.model, messages=cast(Any, conversation), temperature=0, max_tokens=self.max_tokens, **options
            )
            choice = completion.choices[0]
            text = redact(choice.message.content or "")  # it is stored, and a server may echo the key
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, IndexError) as error:
            fix = f"set {self.names.address} to the address above /chat/completions"
            raise DataError(f"{self.base_url}: the reply is not a chat completion; {fix}") from error
        tokens = choice.logprobs.content if top_logprobs and choice.logprobs else None
        likeliest = tokens[0].top_logprobs if tokens else None
        return Reply(text, {t.token: t.logprob for t in likeliest} if likeliest else None)

    def _message(self, error: OpenAIError) -> str:
        """One line: which server, what went wrong, how to fix it. A server's own words about a key are left out."""
        import openai

        match error:
            case openai.APITimeoutError():
                what = f"no reply within {self.timeout:g} seconds; lower {self.names.parallel} or use a faster server"
            case openai.APIConnectionError():
                what = f"can't be reached; start the server or correct {self.names.address}"
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                what = f"refuses the key; export {KEY} with a key that may use {self.model}"
            case openai.NotFoundError():
                what = f"has no model '{self.model}' there; correct {self.names.model} or {self.names.address}"
            case openai.RateLimitError():
                what = f"too many requests, after {self.retries} retries; lower {self.names.parallel}"
            case openai.APIStatusError():
                reason = " ".join(error.message.split())[:300]
                fix = f"look at the server's log, or try another {self.names.model}"
                what = f"status {error.status_code} ({reason}); {fix}"
            case _:
                what = f"{type(error).__name__}; check that {self.names.address} is an OpenAI-compatible server"
        return f"{self.base_url}: {what}"


def key_from(variable: str = KEY) -> str:
    """The key, "" for none. Raises ConfigError for an invalid header value, which the HTTP library would print."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(Problem(variable, "(not shown)", "printable ASCII", "export it again"))
    return key


def listed_models(address: str, key: str, option: str, expected: str) -> dict[str, Any]:
    """What the server says of each of its models, by the model's name.

    Raises ConfigError where that can't be read; it names the `option` that has the address, and what is `expected`.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx2.get(f"{address.rstrip('/')}/models", headers=headers, timeout=LISTING_SECONDS)
        answer.raise_for_status()
        return {card["id"]: card for card in answer.json()["data"]}
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
        fix = f"its models can't be read ({error}); start it, or correct the address"
        raise ConfigError(Problem(option, address, expected, fix)) from error


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
    """All that is wrong with the settings of the judges' endpoint."""
    found = list(address_problems(settings.endpoint, "judges.endpoint"))
    if not settings.endpoint_model:
        fix = "set it to a model that the endpoint serves"
        found.append(Problem("judges.endpoint_model", settings.endpoint_model, "a model's name", fix))
    return found


def address_problems(address: str, key: str, variable: str = KEY) -> Iterator[Problem]:
    """What is wrong with a server's address, which the user sets by this key; `variable` holds the key for it."""
    try:
        url = urlsplit(address)
    except ValueError:  # e.g. brackets without an IPv6 address inside
        url = urlsplit("")
    if "@" in address:
        yield Problem(key, "(not shown)", "no user and password", f"export the key as {variable}")
    elif url.scheme not in ("http", "https") or not url.netloc:
        yield Problem(key, address, ADDRESS, "set it, for a local server as http://localhost:8000/v1")


def connect(settings: JudgesConfig) -> Endpoint:
    """The config's endpoint; nothing is sent yet. Raises ConfigError with every problem, ModuleNotFoundError."""
    import openai  # noqa: F401 (to fail here, and not after hours of answers)

    if found := problems(settings):
        raise ConfigError(*found)
    return Endpoint(settings.endpoint, settings.endpoint_model, settings.endpoint_parallel)
