"""The endpoint client against a real server on this machine."""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace

import pytest
from endpoint_server import ChatServer, Raw, Said, failure

from alignx_ds.config.evaluation import JudgesConfig
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.evaluation.endpoint import Endpoint, Message, Reply, connect

LIMIT = 30.0  # seconds
SECRET = "sk-not-to-be-seen-0123456789"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(reply=str.upper) as running:
        yield running


def said(*texts: str) -> list[list[Message]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_replies_come_in_order_whatever_order_they_were_made_in() -> None:
    answered = threading.Event()

    def first_one_last(prompt: str) -> str:
        if prompt == "q0":
            assert answered.wait(LIMIT)
        elif prompt == "q3":
            answered.set()
        return prompt.upper()

    with ChatServer(reply=first_one_last) as server:
        replies = list(Endpoint(server.url, "m", 4).ask(said(*(f"q{n}" for n in range(20)))))
    assert replies == [Reply(f"Q{n}") for n in range(20)]


@pytest.mark.parametrize("parallel", [1, 3])
def test_as_many_requests_are_under_way_as_allowed_and_no_more(server: ChatServer, parallel: int) -> None:
    """The server answers nothing before so many have come; a moment more would show one too many."""
    together = threading.Barrier(parallel)

    def when_all_are_here(prompt: str) -> str:
        together.wait(LIMIT)
        time.sleep(0.1)
        return prompt

    server.reply = when_all_are_here
    assert len(list(Endpoint(server.url, "m", parallel).ask(said(*"abcdef")))) == 6
    assert server.busiest == parallel


def test_a_request_is_greedy_short_and_names_the_model(server: ChatServer) -> None:
    list(Endpoint(server.url, "a-judge", 1).ask(said("q")))
    body = server.received[0].body
    assert (body["model"], body["temperature"], body["messages"]) == ("a-judge", 0, said("q")[0])
    assert 1 <= body["max_tokens"] <= 16
    assert "logprobs" not in body


def test_replies_are_there_before_the_last_conversation_is_known(server: ChatServer) -> None:
    def endless() -> Iterator[list[Message]]:
        while True:
            yield from said("q")

    replies = Endpoint(server.url, "m", 2).ask(endless())
    assert [next(replies).text for _ in range(3)] == ["Q"] * 3
    assert isinstance(replies, Generator)
    replies.close()
    assert len(server.received) < 10, "no request is sent far ahead of its reply"


def test_closing_cancels_the_requests_that_are_not_sent() -> None:
    closing = threading.Event()

    def held_but_the_first(prompt: str) -> str:
        assert prompt == "a" or closing.wait(LIMIT)
        return prompt

    with ChatServer(reply=held_but_the_first) as server:
        replies = Endpoint(server.url, "m", 2).ask(said(*"abcd"))
        assert next(replies).text == "a"
        while len(server.received) < 3:
            time.sleep(0.01)
        assert isinstance(replies, Generator)
        threading.Timer(0.5, closing.set).start()  # `close` waits for the requests that were sent
        replies.close()
    assert sorted(r.prompt for r in server.received) == ["a", "b", "c"], "d was still waiting for its turn"


def test_logprobs_of_the_first_token_where_the_server_gives_them() -> None:
    known = {"A": math.log(0.7), "B": math.log(0.2), "C": math.log(0.1)}
    replies = {"with": Said("A", known), "without": Said("A"), "nothing": Said(None)}
    with ChatServer(reply=replies.__getitem__) as server:
        endpoint = Endpoint(server.url, "m", 1)
        given = list(endpoint.ask(said("with", "without", "nothing"), top_logprobs=2))
        unasked = list(endpoint.ask(said("with")))
    assert given == [Reply("A", {"A": known["A"], "B": known["B"]}), Reply("A"), Reply("")]
    assert unasked == [Reply("A")]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_temporary_failure_is_retried(server: ChatServer, status: int) -> None:
    server.failures = [failure(status)] * 2
    assert list(Endpoint(server.url, "m", 1).ask(said("q"))) == [Reply("Q")]
    assert len(server.received) == 3


@pytest.mark.parametrize(
    ("status", "attempts", "fix"),
    [
        (401, 1, "OPENAI_API_KEY"),
        (403, 1, "OPENAI_API_KEY"),
        (404, 1, "judges.endpoint_model"),
        (400, 1, "as the test wants it"),
        (429, 3, "judges.endpoint_parallel"),
        (500, 3, "server's log"),
    ],
)
def test_a_permanent_failure_is_one_line_with_a_fix(server: ChatServer, status: int, attempts: int, fix: str) -> None:
    server.failures = [failure(status)] * 9
    with pytest.raises(DataError, match=fix) as error:
        list(Endpoint(server.url, "m", 1, retries=2).ask(said("q")))
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.received) == attempts


def test_an_endpoint_without_a_server() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(DataError, match=r"can't be reached; start the server or correct judges\.endpoint$"):
            list(Endpoint(url, "m", 2, retries=0).ask(said("q", "r")))


def test_a_server_that_is_too_slow(server: ChatServer) -> None:
    server.delay = 1.0
    with pytest.raises(DataError, match=r"no reply within 0\.2 seconds"):
        list(Endpoint(server.url, "m", 1, timeout=0.2, retries=0).ask(said("q")))


@pytest.mark.parametrize(
    "raw",
    [
        Raw(200, "<html>hello</html>", "text/html"),
        Raw(200, '{"choices": []}'),
        Raw(200, '{"choices": [{}]}'),
        Raw(200, "{"),
    ],
    ids=lambda raw: raw.body,
)
def test_a_page_that_is_no_chat_completion(server: ChatServer, raw: Raw) -> None:
    server.failures = [raw]
    with pytest.raises(DataError, match=r"judges\.endpoint") as error:
        list(Endpoint(server.url, "m", 1).ask(said("q")))
    assert "\n" not in str(error.value)


def test_replies_before_a_failure_are_not_lost(server: ChatServer) -> None:
    server.reply = lambda prompt: failure(400) if prompt == "bad" else prompt
    replies = Endpoint(server.url, "m", 1).ask(said("one", "two", "bad", "three"))
    assert [next(replies).text, next(replies).text] == ["one", "two"]
    with pytest.raises(DataError):
        next(replies)


def test_the_key_is_in_its_header_and_nowhere_else(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    caplog.set_level(logging.DEBUG)
    endpoint = Endpoint(server.url, "m", 1, retries=1)
    list(endpoint.ask(said("q")))
    request = server.received[0]
    assert request.headers.pop("authorization") == f"Bearer {SECRET}"
    assert SECRET not in f"{request} {endpoint}"
    for status in (400, 401, 404, 429, 500):
        server.failures = [failure(status, f"your key {SECRET} is bad")] * 2
        with pytest.raises(DataError) as error:
            list(endpoint.ask(said("q")))
        assert SECRET not in "".join(_whole(error.value)), status
    assert caplog.records, "the client did log"
    assert SECRET not in caplog.text


def _whole(error: BaseException | None) -> Iterator[str]:
    """What a traceback would print of an error: its text, and its causes'."""
    while error is not None:
        yield f"{error!r} {error}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_key_that_no_header_can_carry_is_not_shown(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (f"{SECRET}…", f"{SECRET}\n{SECRET}"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ConfigError, match="OPENAI_API_KEY") as error:
            list(Endpoint(server.url, "m", 1).ask(said("q")))
        assert SECRET not in str(error.value)
    assert not server.received


def test_a_local_server_needs_no_key(server: ChatServer) -> None:
    assert list(Endpoint(server.url, "m", 1).ask(said("q"))) == [Reply("Q")]


COMPLETE = JudgesConfig(endpoint="http://localhost:8000/v1", endpoint_model="m", endpoint_parallel=3)


def test_connect_takes_the_configs_endpoint() -> None:
    assert connect(COMPLETE) == Endpoint("http://localhost:8000/v1", "m", 3)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        (JudgesConfig(), ["judges.endpoint", "judges.endpoint_model"]),
        (replace(COMPLETE, endpoint="localhost:8000"), ["judges.endpoint"]),
        (replace(COMPLETE, endpoint="http://me:secret@host/v1"), ["judges.endpoint"]),
    ],
)
def test_a_config_without_an_endpoint(settings: JudgesConfig, keys: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        connect(settings)
    assert [problem.key for problem in error.value.problems] == keys
    assert "secret" not in str(error.value)
