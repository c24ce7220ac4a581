"""Requests whose right replies are known, because the server was asked them while it had nothing else to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from random import Random
from typing import Any

from suite.served_models import NAME, NEEDS

Body = dict[str, Any]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
WORDS = "how do i burn the sailor bake bread find a kind doctor please tell me what is true about your work ?".split()
TIE = 1e-4  # nats between the two likeliest tokens: with less, rounding in another batch may choose the other one
PATIENCE = 120.0  # seconds without a byte, after which a request is lost


@dataclass(frozen=True)
class Reply:
    """What a client got. A status of 0: no reply, and `said` has the reason."""

    status: int
    said: str = ""  # the error's message
    texts: tuple[str, ...] = ()  # of the choices
    ends: tuple[str | None, ...] = ()  # why each of them ended
    tokens: int = 0  # generated


@dataclass(frozen=True)
class Question:
    """A request that is not sampled, and its reply. Streamed, it has the same."""

    path: str
    body: Body
    right: Reply

    def body_bytes(self, *, stream: bool) -> bytes:
        more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return json.dumps(self.body | more).encode()


@dataclass
class Client:
    """One connection, which stays open from request to request."""

    port: int
    _connection: HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        self._connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def post(self, path: str, body: bytes) -> HTTPResponse:
        self._connection.request("POST", path, body, JSON)
        return self._connection.getresponse()

    def send(self, path: str, body: bytes) -> Reply:
        """The reply, read to its end."""
        try:
            return read(self.post(path, body))
        except (OSError, HTTPException, ValueError, KeyError) as error:
            self.close()
            return Reply(0, f"{type(error).__name__}: {error}")

    def ask(self, question: Question, *, stream: bool = False) -> Reply:
        return self.send(question.path, question.body_bytes(stream=stream))

    def close(self) -> None:
        self._connection.close()


def read(response: HTTPResponse) -> Reply:
    """Raises ValueError or KeyError for a reply that is not whole or not OpenAI's."""
    kind = response.getheader("content-type", "").partition(";")[0]
    if kind == "text/event-stream":
        reply = _streamed(response.status, _events(response))
        response.read()  # the connection takes no other request before
        return reply
    text = response.read().decode()
    if kind != "application/json":
        return Reply(response.status, text.strip())
    body = json.loads(text)
    if "error" in body:
        return Reply(response.status, body["error"]["message"])
    choices = sorted(body["choices"], key=lambda choice: choice["index"])
    texts = tuple(c["text"] if "text" in c else c["message"]["content"] for c in choices)
    ends = tuple(choice["finish_reason"] for choice in choices)
    return Reply(response.status, "", texts, ends, body["usage"]["completion_tokens"])


def _events(lines: Iterable[bytes]) -> Iterator[Body]:
    """A stream's chunks, up to the line that ends it."""
    for line in lines:
        data = line.decode().removeprefix("data: ").strip()
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)
    raise ValueError("the stream has no end")


def _streamed(status: int, events: Iterator[Body]) -> Reply:
    texts: dict[int, str] = {}
    ends: dict[int, str | None] = {}
    tokens = 0
    for event in events:
        if "error" in event:
            return Reply(status, event["error"]["message"])
        for choice in event["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
            ends[choice["index"]] = choice["finish_reason"]
        tokens = event.get("usage", {}).get("completion_tokens", tokens)
    order = sorted(texts)
    return Reply(status, "", tuple(texts[i] for i in order), tuple(ends[i] for i in order), tokens)


def questions(client: Client, random: Random, count: int, tokens: int) -> list[Question]:
    """So many: of both endpoints, the gate's own decision and every axis, one answer and two, with a stop and without.

    Answers have up to `tokens` tokens. What is a tie of two tokens is left out. Raises RuntimeError where the server
    does not answer.
    """
    found: list[Question] = []
    for number in range(10 * count):
        if len(found) == count:
            break
        path, body = _request(random, number, tokens)
        likely = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
        first = client.send(path, json.dumps(body).encode())
        if not first.texts:
            raise RuntimeError(f"{path} answered {first}")
        if _margin(client, path, body | likely) < TIE:
            continue
        if number // 2 % 4 == 1:
            body["n"] = 2
        if number // 2 % 4 == 2 and (words := first.texts[0].split()):
            body["stop"] = [words[len(words) // 2]]
        found.append(Question(path, body, client.send(path, json.dumps(body).encode())))
    assert len(found) == count, "almost every answer is a tie"
    return found


def _request(random: Random, number: int, tokens: int) -> tuple[str, Body]:
    text = " ".join(random.choices(WORDS, k=random.randint(4, 40)))
    path = CHAT if number % 2 else COMPLETIONS
    prompt: Body = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    needs = random.choice((None, *NEEDS))
    axes = {} if needs is None else {"axes": needs}
    limit = random.randint(tokens // 4 + 1, tokens)
    return path, {"model": NAME, "temperature": 0, "max_tokens": limit, **prompt, **axes}


def _margin(client: Client, path: str, body: Body) -> float:
    """The least distance, in nats, of the two likeliest tokens anywhere in the answer."""
    given = json.loads(client.post(path, json.dumps(body).encode()).read())["choices"][0]["logprobs"]
    if path == CHAT:
        pairs = [[one["logprob"] for one in token["top_logprobs"]] for token in given["content"]]
    else:
        pairs = [list(names.values()) for names in given["top_logprobs"]]
    return min(max(pair) - min(pair) for pair in pairs)
